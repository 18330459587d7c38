"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from .launch import squared_relu, squared_relu_backward, swiglu, swiglu_backward

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """Both activations on the hidden channels of an MLP, or of the experts that the tokens go to."""
    rows = shape.tokens * max(1, shape.K)
    dy, x, up = (torch.empty(rows, shape.F, dtype=torch.bfloat16, device="meta") for _ in range(3))
    with recorded(arch) as record:
        squared_relu(x)
        squared_relu_backward(dy, x)
        swiglu(x, up)
        swiglu_backward(dy, x, up)
    return record.compilations
