"""``plait::causal_convolution`` and its backward, as torch knows them, and the function that calls them."""

# B batch, L length, C channels, K taps (the halo has K-1 tokens)

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..forms import form_of
from . import eager

__all__ = ["causal_convolution"]


def causal_convolution(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    halo_BKC: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> Tensor:
    """Causal depthwise convolution: ``y_t = act(bias + sum_j weight[:, K-1-j] * x_{t-j})``, j = 0 … K-1.

    A tap counts only if the token at t-j is of the same document as t. What another document holds
    does not change a bit of a document's outputs.

    Args:
        x_BLC: ``(B, L, C)``, any strides, any L ≥ 1.
        weight_CK: ``(C, K)``; the last column meets the token itself.
        bias_C: ``(C,)`` or None.
        halo_BKC: ``(B, K-1, C)``, the tokens before the sequence, the nearest last; None means zeros.
        document_ids_BL: ``(B, L)`` integers that do not decrease along L; 0 continues the document
            that the halo belongs to, ≥ 1 starts afresh. None means one document, the halo's.
        activation: what follows the sum.

    Returns:
        ``(B, L, C)`` in x's dtype. Sums are fp32 at least, float64 under float64.

    Raises:
        ValueError: shapes that do not fit, or another activation.
    """
    B, L, C = x_BLC.shape
    K = weight_CK.shape[1]
    if L < 1:
        raise ValueError("causal_convolution: x has no token")
    if activation not in ("silu", None):
        raise ValueError(f"causal_convolution: activation = {activation!r}, not 'silu' or None")
    for name, tensor, shape in (
        ("weight", weight_CK, (C, K)),
        ("bias", bias_C, (C,)),
        ("halo", halo_BKC, (B, K - 1, C)),
        ("document_ids", document_ids_BL, (B, L)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"causal_convolution: {name} is {tuple(tensor.shape)}, not {shape}")
    return _forward(x_BLC, weight_CK, bias_C, halo_BKC, document_ids_BL, activation == "silu")


def _form(x: Tensor, weight: Tensor) -> ModuleType:
    if form_of(x) == "torch":
        return eager
    from . import triton

    return triton if triton.fits(weight) else eager


@torch.library.custom_op("plait::causal_convolution", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    document_ids: Tensor | None,
    silu: bool,
) -> Tensor:
    return _form(x, weight).forward(x, weight, bias, halo, document_ids, silu)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    document_ids: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("plait::causal_convolution_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    document_ids: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _form(x, weight).backward(dy, x, weight, bias, halo, document_ids, silu)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    document_ids: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(x), like(weight), like(bias), like(halo)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, _, bias, halo, _ = tensors = ctx.saved_tensors
    dx, dweight, dbias, dhalo = _backward(dy, *tensors, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if halo is None else dhalo, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
