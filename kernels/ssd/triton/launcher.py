"""Where SSD's kernels run: the architecture's choices, and the launch itself."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...forms import interpreted
from ...tables import arch_of, choice
from .shapes import Shape

__all__ = ["Launcher", "launcher_of"]


class Launcher:
    """Launches kernels on a device.

    Attributes:
        arch: names the table of choices.
        processors: streaming multiprocessors, or compute units.
        mode: how products are made; see `tiles.product`.
    """

    def __init__(self, arch: str, processors: int, mode: str, device: torch.device) -> None:
        self.arch, self.processors, self.mode, self.device = arch, processors, mode, device

    def choice(self, kernel: str, shape: Shape) -> dict[str, Any]:
        """Blocks by their names in the kernel, warps and stages."""
        entry = choice(kernel, self.arch, P=shape.P, N=shape.N, Q=shape.Q, bytes=shape.bytes)
        blocks = {name.upper(): value for name, value in entry.items() if name.startswith("block")}
        options = {name: value for name, value in entry.items() if not name.startswith("block")}
        return shape.fitted({**blocks, **options})

    def walks_over_chunks(self, shape: Shape, entry: Mapping[str, Any]) -> bool:
        """Whether one program a head and tile, serial over chunks, fills the device twice; else chunks are
        worked on side by side and a second kernel passes the states on."""
        return shape.K == 1 or shape.batch * shape.H * shape.tiles(entry) >= 2 * self.processors

    def splits(self, shape: Shape) -> int:
        """Among how many programs a group's heads are divided, where one a group leaves the device idle."""
        blocks = -(-shape.Q // 64)
        for splits in range(1, shape.R):
            if shape.R % splits == 0 and shape.M * shape.G * blocks * splits >= 2 * self.processors:
                return splits
        return shape.R

    def run(
        self,
        kernel: Any,
        entry: Mapping[str, Any],
        programs: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        **constants: Any,
    ) -> None:
        """Launch `kernel` with its arguments in order: tensors, numbers, then constants by name."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            kernel[(programs,)](*tensors, *numbers, **constants, **entry)


@functools.cache
def launcher_of(device: torch.device) -> Launcher:
    if device.type == "cpu":
        return Launcher("sm_80", 1, "interpret" if interpreted() else "ieee", device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Launcher(arch_of(device), processors, "ieee" if torch.version.hip else "tf32x3", device)
