"""Files made to do harm, drawn at random or by hand, and the bounds that reading them must keep to."""

import contextlib
import copy
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from plait.errors import LONGEST, UserError

SECONDS, ROOM = 5.0, 400 << 20
"""Of the processor, and bytes of memory above what is taken already; a thread's stacks are within it."""

COUNTS = [30, pytest.param(600, marks=pytest.mark.long)]
"""Drawn files of each kind."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "../../etc/passwd", "/dev/zero", "\ud800", "\x1b]0;x\x07", "a\nb", "x" * 10_000),
    *("M" * 5000, "[" * 300, "[[ME]x999]x999", "!!python/object/apply:os.system [ls]", "float32", "BF16"),
    *([], {}, [[]], [0] * 100, [2**62, 2**62], [2**40, 0, 2**40], [1e400], {"a": {}}, {"": None}),
]


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """No hang, and no large allocation: one of either fails."""

    def hangs(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    page = os.sysconf("SC_PAGE_SIZE")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * page
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < SECONDS
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survived(*readers: Callable[[], object]) -> list[str]:
    """The lines of those readers that refused."""
    said = []
    with bounds():
        for reader in readers:
            try:
                reader()
            except UserError as error:
                said.append(str(error))
    for line in said:
        assert line.isprintable()
        assert len(line) <= LONGEST + 3
    return said


def drawn(count: int) -> Callable[[Callable[[random.Random], None]], None]:
    """Run a body with that many sources of randomness."""

    def decorate(body: Callable[[random.Random], None]) -> None:
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[
                hypothesis.HealthCheck.too_slow,
                hypothesis.HealthCheck.large_base_example,
            ],
        )
        @hypothesis.given(st.integers(0, 2**32))
        def run(seed: int) -> None:
            body(random.Random(seed))

        run()

    return decorate


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with each of its keys."""
    pairs: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            pairs.append((node, key))
            stack.append(value)
    return pairs


def reshape(tree: Any, draw: random.Random) -> Any:
    """The tree with one to three of its values put otherwise."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = places(tree)
        if not found:
            return draw.choice(VALUES)
        node, key = draw.choice(found)
        kind = draw.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, their_key = draw.choice(found)
            node[key] = copy.deepcopy(other[their_key])
        elif kind == 2 and isinstance(node, dict):
            node[draw.choice(["", "../x", "\ud800", "rank-00009.bin", "x" * 3000])] = node.pop(key)
        elif kind == 3 and type(node[key]) is int:
            node[key] = draw.choice([-node[key], node[key] + 1, node[key] * 2**20, node[key] - 1])
        else:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def scratch(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut off, flipped, doubled, zeroed or written over."""
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 8])):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:end] + data[at:]
    if kind == 3:
        return data[:at] + bytes(end - at) + data[end:]
    return data[:at] + draw.randbytes(min(8, len(data) - at)) + data[at + 8 :]


def hostile_json(tree: Any, data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.75:
        return json.dumps(reshape(tree, draw)).encode("ascii")
    return scratch(data, draw)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def terabyte(path: Path) -> None:
    os.truncate(path, 1 << 40)


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


def leads_out(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
