"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from .launch import squared_relu, squared_relu_backward, swiglu, swiglu_backward

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """Both activations on the hidden channels of an MLP, or of the experts that the tokens go to."""
    rows = shape.tokens * max(1, shape.K)
    x = torch.empty(rows, shape.F, dtype=torch.bfloat16, device="meta")
    with recorded(arch) as record:
        squared_relu(x)
        squared_relu_backward(x, x)
        swiglu(x, x)
        swiglu_backward(x, x, x)
    return record.compilations
