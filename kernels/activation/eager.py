"""The activations in torch operators, with the backward by hand.

Every step writes into a result, so no memory is asked for but the results'. Each operator computes in fp32
at least and rounds to the tensors' dtype. Blocks that fit the cache were no faster here: the steps are few.
"""

import torch
from torch import Tensor

__all__ = ["squared_relu", "squared_relu_backward", "swiglu", "swiglu_backward"]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)²``, contiguous; the only rounding is that of the square."""
    return torch.clamp_min(x, 0, out=_contiguous(x)).square_()


def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``2 max(x, 0) dy``; the only rounding is that of the product with dy."""
    return torch.clamp_min(x, 0, out=_contiguous(x)).mul_(2).mul_(dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, contiguous; rounded after the SiLU and after the product."""
    y = _contiguous(gate)
    torch.ops.aten.silu.out(gate, out=y)
    return y.mul_(up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, each rounded twice."""
    dgate = torch.mul(dy, up, out=_contiguous(gate))
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate, swiglu(gate, dy)


def _contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
