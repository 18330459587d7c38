"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from .launch import backward, forward

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """The mixer's widest convolution, that of x, with documents and a halo."""
    B, L, C, K = shape.B, shape.L, shape.d_inner, shape.d_conv

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy = meta(B, L, C), meta(B, L, C)
    rest = meta(C, K), meta(C), meta(B, K - 1, C), meta(B, L, dtype=torch.int64), True
    with recorded(arch) as record:
        forward(x, *rest)
        backward(dy, x, *rest)
    return record.compilations
