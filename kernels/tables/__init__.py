"""Block sizes, warps and stages of the Triton kernels, by architecture, kernel and class of shapes.

Nothing is tuned while a model runs. `ARCH.json` in this folder names, for each kernel, its choices: a list
whose first entry that fits is taken.

    {"like": "sm_80", "kernels": {"a_kernel": [{"upto": {"N": 64}, "block": 128, "num_warps": 4}, {…}]}}

An entry fits where every key of its "upto" is at most the bound given there; the last one has none, and fits
always. A kernel that a table leaves out is looked for in the one it is "like". A user's own table,
`~/.config/plait/kernels/ARCH.json`, of the same form, wins kernel by kernel.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError

__all__ = [
    "ARCHITECTURES",
    "SHARED_MEMORY",
    "arch_of",
    "assuming",
    "choice",
    "nearest",
    "own_table_path",
    "trying",
]

SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Bytes of shared memory that a block of threads may take."""
ARCHITECTURES = tuple(SHARED_MEMORY)


def choice(kernel: str, arch: str, **key: int) -> dict[str, Any]:
    """The entry for a kernel at a shape: its block sizes, and `num_warps` and `num_stages`.

    Args:
        arch: as `arch_of` names it; one without a table takes its nearest.
        key: the shape's sizes that the kernel's entries ask about.

    Raises:
        KeyError: no table knows the kernel.
        UserError: the user's own table cannot be read.
    """
    if (asked := _asked.get()) is not None:
        asked.append((kernel, key))
    if (tried := _tried.get()) and kernel in tried:
        return dict(tried[kernel])
    return dict(_choice(kernel, arch, tuple(key.items())))


@contextlib.contextmanager
def assuming(arch: str) -> Iterator[None]:
    """Inside, every device is of this architecture: for compiling ahead of time."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def trying(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, these kernels take these entries whatever the tables say: for tuning."""
    token = _tried.set(entries)
    try:
        yield
    finally:
        _tried.reset(token)


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Inside, what is asked for is written down: kernels and the sizes they ask with."""
    token = _asked.set(asked := [])
    try:
        yield asked
    finally:
        _asked.reset(token)


def entries(kernel: str, arch: str) -> list[dict[str, Any]]:
    """A kernel's entries as they stand, to be changed as one likes."""
    return [dict(entry) for entry in _entries(kernel, arch)]


def fits(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether an entry is for a shape of these sizes."""
    return all(sizes[name] <= bound for name, bound in entry.get("upto", {}).items())


_asked: ContextVar[list[tuple[str, dict[str, int]]] | None] = ContextVar("asked", default=None)
_assumed: ContextVar[str | None] = ContextVar("assumed", default=None)
_tried: ContextVar[Mapping[str, Mapping[str, Any]] | None] = ContextVar("tried", default=None)


def arch_of(device: torch.device) -> str:
    """sm_90, gfx942, …; a CPU, which interprets, is an sm_80."""
    return _assumed.get() or _arch_of(device)


@functools.cache
def _arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def nearest(arch: str) -> str:
    """The architecture whose table serves this one: itself, or of its generation that with least memory."""
    if arch in SHARED_MEMORY:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    same = [known for known in ARCHITECTURES if known[:-1] == arch[:-1]]
    return min(same, key=SHARED_MEMORY.__getitem__, default="sm_86")


def own_table_path(arch: str) -> Path:
    """Where a user's own table for an architecture lies."""
    return Path.home() / ".config" / "plait" / "kernels" / f"{arch}.json"


@functools.cache
def _choice(kernel: str, arch: str, key: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    sizes = dict(key)
    for entry in _entries(kernel, arch):
        if fits(entry, sizes):
            return {name: value for name, value in entry.items() if name != "upto"}
    raise KeyError(f"{kernel}: no entry for {sizes} in the table of {arch}")


def _entries(kernel: str, arch: str) -> list[dict[str, Any]]:
    own = _own_table(arch)
    if kernel in own:
        return own[kernel]
    like: str | None = nearest(arch)
    while like is not None:
        table = _table(like)
        if kernel in table["kernels"]:
            return table["kernels"][kernel]
        like = table.get("like")
    raise KeyError(f"{kernel}: in no table for {arch}")


@functools.cache
def _table(arch: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / f"{arch}.json").read_text())


@functools.cache
def _own_table(arch: str) -> dict[str, Any]:
    path = own_table_path(arch)
    try:
        kernels = json.loads(path.read_text())["kernels"]
        fits = all(isinstance(entry, dict) for entries in kernels.values() for entry in entries)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no table of kernels ({error}): remake it or remove it") from None
    if not fits:
        raise UserError(f"{path} is no table of kernels (an entry is no object): remake it or remove it")
    return kernels
