"""Launching a Triton kernel with its table's block sizes, or, ahead of time, noting what would be launched.

Under `recorded` an operator's Triton form is called with tensors on the meta device: it then launches nothing
and leaves the launches, for the architecture named, as the `Compilation`s that they would need.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compiling import Compilation
from .tables import arch_of, choice

__all__ = ["Record", "launch", "recorded", "sizes_of"]

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass
class Record:
    """The launches for an architecture, in the order of their use."""

    arch: str
    compilations: list[Compilation] = field(default_factory=list)


_record: ContextVar[Record | None] = ContextVar("record", default=None)


@contextmanager
def recorded(arch: str) -> Iterator[Record]:
    """Note launches instead of making them."""
    record = Record(arch)
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def sizes_of(kernel: str, device: torch.device, **key: int) -> dict[str, Any]:
    """The table's entry for a kernel on this device, or on the one that launches are noted for."""
    record = _record.get()
    return choice(kernel, arch_of(device) if record is None else record.arch, **key)


def launch(
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    written: Sequence[str] = (),
    updated: Sequence[str] = (),
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Launch `kernel` on the device of its first tensor.

    Args:
        name: operator.kernel, for the record.
        written: the arguments that it writes to; the other tensors it reads, each once.
        updated: those that it reads and writes.
        constants: its constexpr arguments.
    """
    record = _record.get()
    if record is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        out = tuple(written), tuple(updated)
        record.compilations.append(_compilation(name, kernel, grid, named, *out, num_warps, num_stages))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def _compilation(
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    named: dict[str, Any],
    written: tuple[str, ...],
    updated: tuple[str, ...],
    num_warps: int,
    num_stages: int,
) -> Compilation:
    constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    out = {id(tensors[key]): tensors[key].nbytes for key in (*written, *updated)}
    # What stands in for a tensor that is absent is another argument, and is not read twice.
    read = {id(value): value.nbytes for value in tensors.values() if id(value) not in out}
    return Compilation(
        name,
        kernel,
        {key: "constexpr" if key in constants else _type(named[key]) for key in kernel.arg_names},
        constants,
        grid,
        num_warps,
        num_stages,
        {key: value for key, value in named.items() if type(value) is int and key not in constants},
        sum(read.values()) + sum(tensors[key].nbytes for key in updated),
        sum(out.values()),
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
