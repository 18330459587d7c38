"""Launches written down instead of done: what a call of an operator's kernels would run at a shape.

Inside `recording` tensors may be on the meta device, so that no memory is taken and no GPU need be there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .compiling import Compilation, target_of
from .forms import interpreted
from .tables import assuming

__all__ = ["recording"]


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Compilation]]:
    """Collect every kernel launched inside, in order, as on a GPU of this architecture; none runs.

    Raises:
        RuntimeError: triton interprets, which has no launches.
    """
    if interpreted():
        raise RuntimeError("launches cannot be recorded under TRITON_INTERPRET=1")
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    written: list[Compilation] = []
    asked: list[dict[str, Any]] = []

    def note(*, compile: Any, **_: Any) -> bool:
        asked.append(compile)
        return True

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        # Triton itself says what it would compile: types, constants, and what it knows of addresses and
        # numbers. So a binary made ahead of time is the one that the launch looks for.
        launch(kernel, *args, grid=grid, warmup=True, **named)
        written.append(_compilation(kernel, args, grid, named, asked.pop()))

    launch, hook, active = JITFunction.run, knobs.runtime.jit_cache_hook, driver._active
    driver.set_active(_Pretended(arch))  # pyright: ignore[reportArgumentType]
    knobs.runtime.jit_cache_hook = note  # pyright: ignore[reportAttributeAccessIssue]
    setattr(JITFunction, "run", run)  # noqa: B010, an assignment of which the type checker would not hear
    try:
        with assuming(arch):
            yield written
    finally:
        setattr(JITFunction, "run", launch)  # noqa: B010
        knobs.runtime.jit_cache_hook = hook
        driver._active = active


class _Pretended:
    """What triton asks of a driver before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> Any:
        # Kernels keep what they know of a device by this; the real ones are numbers.
        return f"pretended {self.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target_of(self.arch)


def _compilation(
    kernel: Any, args: tuple[Any, ...], grid: Any, named: dict[str, Any], compile: dict[str, Any]
) -> Compilation:
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    shape: Any = grid(values) if callable(grid) else grid
    names = kernel.arg_names
    attributes = {path: tuple(map(tuple, known)) for path, known in compile["configs"][0].items()}
    operator = kernel.fn.__module__.partition(".kernels.")[2].partition(".")[0]
    return Compilation(
        f"{operator}.{kernel.fn.__name__.removesuffix('_kernel')}",
        kernel,
        dict(compile["signature"]),
        {names[path[0]]: value for path, value in compile["constants"].items()},
        tuple(shape),
        compile["num_warps"],
        compile["num_stages"],
        attributes,
        {
            name: value.numel() * value.element_size()
            for name, value in values.items()
            if isinstance(value, Tensor)
        },
        options={
            name: value for name, value in named.items() if name not in (*names, "num_warps", "num_stages")
        },
    )
