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

    x, y, group = (meta(shape.B, shape.L, width) for width in (shape.D, shape.d_inner, shape.d_inner // shape.G))
    plain, gated, weight = meta(shape.D), meta(shape.d_inner), meta(group.shape[-1])
    with recorded(arch) as record:
        for one, w in ((x, plain), (meta(shape.B, shape.L, *shape.attention[::2]), meta(shape.attention[2]))):
            _, r = forward(one, None, w, 1e-5, 1)
            backward(one, one, None, w, r)
        _, r = forward(y, y, gated, 1e-5, shape.G)
        backward(y, y, y, gated, r)
        r = squares(group, group)
        output(group, group, weight, r)
        mean = dot_products(group, group, group, weight, r)
        gradients(group, group, group, weight, r, mean)
    return record.compilations
