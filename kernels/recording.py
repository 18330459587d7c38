"""Launches written down instead of done: what a call of an operator's kernels would run at a shape.

Inside `recording` tensors may be on the meta device, so that no memory is taken and no GPU need be there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .compiling import Compilation
from .tables import assuming

__all__ = ["recording"]

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Compilation]]:
    """Collect every kernel launched inside, in order, as on a GPU of this architecture; none runs.

    Raises:
        RuntimeError: triton interprets, which has no launches.
    """
    from triton.runtime.jit import JITFunction

    from .forms import interpreted

    if interpreted():
        raise RuntimeError("launches cannot be recorded under TRITON_INTERPRET=1")
    written: list[Compilation] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        # What a launch leaves out is the compiler's own default, which is not the same everywhere.
        stages = 2 if arch.startswith("gfx") else 3
        written.append(_compilation(kernel, args, grid, {"num_warps": 4, "num_stages": stages} | named))

    launch = JITFunction.run
    setattr(JITFunction, "run", run)  # noqa: B010, an assignment of which the type checker would not hear
    try:
        with assuming(arch):
            yield written
    finally:
        setattr(JITFunction, "run", launch)  # noqa: B010


def _compilation(kernel: Any, args: tuple[Any, ...], grid: Any, named: dict[str, Any]) -> Compilation:
    """As triton specialises a launch: what is 1 is a constant, and what 16 divides is known to be so."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: named.pop(name) for name in kernel.arg_names if name in named}
    signature, constants, aligned, sizes = {}, {}, set(), {}
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            sizes[name] = value.numel() * value.element_size()
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.add(name)
        elif parameter.is_constexpr or value is None or (value == 1 and specialised and _is_int(value)):
            signature[name], constants[name] = "constexpr", value
        elif _is_int(value):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                aligned.add(name)
        else:
            signature[name] = "i1" if isinstance(value, bool) else "fp32"
    warps, stages = named.pop("num_warps"), named.pop("num_stages")
    shape: Any = grid(values) if callable(grid) else grid
    operator = kernel.fn.__module__.partition(".kernels.")[2].partition(".")[0]
    return Compilation(
        f"{operator}.{kernel.fn.__name__.removesuffix('_kernel')}",
        kernel,
        signature,
        constants,
        tuple(shape),
        warps,
        stages,
        frozenset(aligned),
        sizes,
        options=named,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
