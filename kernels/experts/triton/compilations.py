"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from .launch import combine, combine_backward, dispatch, dispatch_backward

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """The rows of all tokens to their experts and back; none for a model without experts."""
    if not shape.E:
        return []
    x = torch.empty(shape.tokens, shape.D, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.tokens, shape.K, dtype=torch.float32, device="meta")
    inverse = torch.empty(shape.tokens, shape.K, dtype=torch.int64, device="meta")
    with recorded(arch) as record:
        rows = dispatch(x, inverse)
        dispatch_backward(rows, inverse)
        combine(rows, weight, inverse)
        combine_backward(x, torch.empty_like(rows), weight, inverse)
    return record.compilations
