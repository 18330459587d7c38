"""``plait::squared_relu`` and ``plait::swiglu`` with their backwards, and the functions that call them."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..forms import form_of
from . import eager

__all__ = ["squared_relu", "swiglu"]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)²`` (arXiv 2109.08668), elementwise; the shape and dtype of x. Saves x alone."""
    return _squared_relu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), elementwise. Saves gate and up alone.

    Args:
        gate: any shape.
        up: the shape and dtype of gate.

    Returns:
        The shape and dtype of gate; in torch operators rounded after the SiLU too.

    Raises:
        ValueError: gate and up differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        sides = f"gate is {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"swiglu: {sides}")
    return _swiglu(gate, up)


def _form(x: Tensor) -> ModuleType:
    if form_of(x) == "torch":
        return eager
    from . import triton

    return triton


@torch.library.custom_op("plait::squared_relu", mutates_args=())
def _squared_relu(x: Tensor) -> Tensor:
    return _form(x).squared_relu(x)


@torch.library.custom_op("plait::squared_relu_backward", mutates_args=())
def _squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _form(x).squared_relu_backward(dy, x)


@torch.library.custom_op("plait::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _form(gate).swiglu(gate, up)


@torch.library.custom_op("plait::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _form(gate).swiglu_backward(dy, gate, up)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


@_squared_relu.register_fake
def _(x: Tensor) -> Tensor:
    return _like(x)


@_squared_relu_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return _like(x)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _like(gate)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(up)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_squared_relu(ctx: Any, dy: Tensor) -> Tensor:
    return _squared_relu_backward(dy, *ctx.saved_tensors)


def _differentiate_swiglu(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_squared_relu.register_autograd(_differentiate_squared_relu, setup_context=_save)
_swiglu.register_autograd(_differentiate_swiglu, setup_context=_save)
