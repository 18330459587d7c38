"""Block sizes found by trial, on the device at hand and never while a model runs.

Each kernel's entry is changed in one size at a time, twice and half of it, as long as the call that launches
it becomes faster; the winner is written into a table of the user's own, which the launches then prefer.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import tables
from .compiling import Shape
from .launches import OPERATORS, Run

__all__ = ["Tuned", "milliseconds", "tune", "write_table"]

LEAST = {"num_warps": 1, "num_stages": 1, "programs": 32}
MOST = {"num_warps": 16, "num_stages": 5, "block_q": 256, "block_p": 256, "block_n": 256}
BLOCK = 16
"""The least of any block: what a product takes."""
GAIN = 0.97
"""A change stays only if the time falls below this part of the best so far: less is noise."""


@dataclass(frozen=True)
class Tuned:
    """What came of a kernel at a shape."""

    kernel: str
    sizes: Mapping[str, int]
    """That the table was asked with."""
    before: float
    """Milliseconds with the entry as it was."""
    after: float
    entry: Mapping[str, Any]
    tried: int
    failed: int
    """Candidates that did not compile, or did not fit into the device."""


def tune(
    shapes: Sequence[Shape],
    device: torch.device,
    arch: str,
    operators: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    most: int | None = None,
    timer: Callable[[Run, torch.device], float] | None = None,
) -> Iterator[Tuned]:
    """Tune each kernel at the first of the shapes that takes an entry of its table.

    Args:
        most: candidates a kernel, at most; None until none is faster.
    """
    timer = timer or milliseconds
    found: dict[str, Mapping[str, Any]] = {}
    done: set[tuple[str, int]] = set()
    for shape in shapes:
        for name in operators:
            with torch.device(device):
                runs = OPERATORS[name](shape, dtype)
                for run in runs:
                    with tables.watching() as asked:
                        run()
                    for kernel, sizes in dict(asked).items():
                        entries = tables.entries(kernel, arch)
                        place = next(i for i, entry in enumerate(entries) if tables.fits(entry, sizes))
                        if (kernel, place) in done:
                            continue
                        done.add((kernel, place))
                        start = {key: value for key, value in entries[place].items() if key != "upto"}
                        tuned = _descend(kernel, sizes, start, found, run, device, most, timer)
                        found[kernel] = tuned.entry
                        yield tuned
            # Sizes of another shape are another entry's matter.
            found.clear()


def write_table(path: Path, arch: str, tuned: Sequence[Tuned]) -> None:
    """A table with the tuned entries in their places, and those for other sizes as they were."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for one in tuned:
        entries = kernels.setdefault(one.kernel, tables.entries(one.kernel, arch))
        place = next(i for i, entry in enumerate(entries) if tables.fits(entry, one.sizes))
        upto = {"upto": entries[place]["upto"]} if "upto" in entries[place] else {}
        entries[place] = upto | dict(one.entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kernels": kernels}, indent=1) + "\n")


def milliseconds(run: Run, device: torch.device) -> float:
    """The median of a call's times over some 40 ms, after one that is not counted."""
    run()
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 40 and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _descend(
    kernel: str,
    sizes: Mapping[str, int],
    entry: dict[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    run: Run,
    device: torch.device,
    most: int | None,
    timer: Callable[[Run, torch.device], float],
) -> Tuned:
    def time_of(candidate: dict[str, Any]) -> float:
        with tables.trying({**found, kernel: candidate}):
            return timer(run, device)

    before = best = time_of(entry)
    seen, failed, better = {_key(entry)}, 0, True
    while better:
        better = False
        for candidate in _neighbours(entry):
            if _key(candidate) in seen or (most is not None and len(seen) > most):
                continue
            seen.add(_key(candidate))
            try:
                took = time_of(candidate)
            # A candidate may ask for too much in many ways: of the compiler, of triton, of the device.
            except Exception:
                failed += 1
                continue
            if took < GAIN * best:
                entry, best, better = candidate, took, True
    return Tuned(kernel, dict(sizes), before, best, entry, len(seen) - 1, failed)


def _neighbours(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in entry.items():
        step = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for changed in step:
            if LEAST.get(name, BLOCK) <= changed <= MOST.get(name, 1 << 14):
                yield {**entry, name: changed}


def _key(entry: Mapping[str, Any]) -> tuple:
    return tuple(sorted(entry.items()))
