"""What calls the kernels."""

from typing import Any

import torch
from torch import Tensor

from ...launching import launch, sizes_of
from . import kernels

__all__ = ["squared_relu", "squared_relu_backward", "swiglu", "swiglu_backward"]


def squared_relu(x: Tensor) -> Tensor:
    """As :func:`..eager.squared_relu`."""
    y = _like(x)
    _launch(kernels.square_positive, x.contiguous(), y)
    return y


def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """As :func:`..eager.squared_relu_backward`."""
    dx = _like(x)
    _launch(kernels.differentiate_squared_relu, dy.contiguous(), x.contiguous(), dx)
    return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As :func:`..eager.swiglu`, but rounded once."""
    y = _like(gate)
    _launch(kernels.gate_by_silu, gate.contiguous(), up.contiguous(), y)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`..eager.swiglu_backward`, each gradient rounded once."""
    dgate, dup = _like(gate), _like(up)
    inputs = dy.contiguous(), gate.contiguous(), up.contiguous()
    _launch(kernels.differentiate_swiglu, *inputs, dgate, dup)
    return dgate, dup


def _launch(kernel: Any, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    if count:
        sizes = sizes_of("activation", tensors[0].device)
        grid = (-(-count // sizes["block"]),)
        launch(kernel, grid, *tensors, count, num_warps=sizes["num_warps"], BLOCK=sizes["block"])


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
