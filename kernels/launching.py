"""Launching a Triton kernel on the device of its tensors, with its table's block sizes."""

from typing import Any

import torch
from torch import Tensor

from .tables import arch_of, choice

__all__ = ["launch", "sizes_of"]


def sizes_of(kernel: str, device: torch.device, **key: int) -> dict[str, Any]:
    """The table's entry for a kernel on this device."""
    return choice(kernel, arch_of(device), **key)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Launch `kernel` on the device of its first tensor.

    Args:
        constants: its constexpr arguments.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
