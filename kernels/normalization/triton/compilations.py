"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from .launch import backward, dot_products, forward, gradients, output, squares

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """The layer's norm, the norm of queries, the gated norm, and its parts where ranks share a group."""

    def meta(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    heads, _, head_dim = shape.attention
    with recorded(arch) as record:
        for size in ((shape.D,), (heads, head_dim)):
            dy, x, weight = meta(shape.B, shape.L, *size), meta(shape.B, shape.L, *size), meta(size[-1])
            _, r = forward(x, None, weight, 1e-5, 1)
            backward(dy, x, None, weight, r)
        dy, x, z = (meta(shape.B, shape.L, shape.d_inner) for _ in range(3))
        _, r = forward(x, z, meta(shape.d_inner), 1e-5, shape.G)
        backward(dy, x, z, meta(shape.d_inner), r)
        width = shape.d_inner // shape.G
        dy, x, z, weight = *(meta(shape.B, shape.L, width) for _ in range(3)), meta(width)
        r = squares(x, z)
        output(x, z, weight, r)
        gradients(dy, x, z, weight, r, dot_products(dy, x, z, weight, r))
    return record.compilations
