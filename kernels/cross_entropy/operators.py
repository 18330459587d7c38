"""``plait::linear_cross_entropy`` and its backward, as torch knows them, and the function that calls them."""

# T tokens, D width, V vocabulary

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..forms import form_of
from . import eager, sharded
from .sharded import VocabularyShard

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross entropy of ``hidden @ weight.T`` against the targets, summed over those that are not -100.

    Never holds more than a chunk's logits. Where a gradient is needed it is computed here, with the loss,
    and kept: the size of hidden, and that of weight in fp32.

    With a shard, weight holds this rank's rows of the head; hidden, targets and chunk_tokens are the same
    on all ranks of the shard. The values are the whole head's, equal on every rank. The gradient of weight
    is that of its rows; that of hidden is this rank's part of a sum over the ranks, which the caller takes.

    Args:
        hidden_TD: ``(T, D)``; the matrix products run in its dtype.
        weight_VD: ``(V, D)``, the head; cast to hidden's dtype if it has another.
        targets_T: ``(T,)`` int64, rows of the whole head; a token with -100 counts nowhere.
        z_loss: coefficient of the squared log-sum-exp of a token's logits.
        chunk_tokens: tokens whose logits exist at a time; None means as many as suit the device.
        shard: where weight's rows lie in the head; None if they are all.

    Returns:
        Two scalars, fp32 at least: ``total``, the sum of cross entropy and z-loss, differentiable with
        respect to hidden and weight; and ``cross_entropy`` alone, detached. Sums, never means.

    Raises:
        ValueError: the shapes do not fit together or to the shard, or chunk_tokens < 1.
    """
    sharded.check_shapes("linear_cross_entropy", hidden_TD, weight_VD, targets_T, shard)
    if chunk_tokens is None:
        chunk_tokens = eager.chunk_size(hidden_TD, sharded.most_rows(weight_VD, shard))
    if chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens = {chunk_tokens}, not at least 1")
    with_grad = torch.is_grad_enabled()
    with_hidden, with_weight = with_grad and hidden_TD.requires_grad, with_grad and weight_VD.requires_grad
    constants = z_loss, chunk_tokens, with_hidden, with_weight
    if shard is not None:
        return sharded.linear_cross_entropy(hidden_TD, weight_VD, targets_T, *constants, shard)
    return _forward(hidden_TD, weight_VD, targets_T, *constants)[:2]


@torch.library.custom_op("plait::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    constants = z_loss, chunk_tokens, with_hidden, with_weight
    if form_of(hidden) == "torch":
        return eager.forward(hidden, weight, targets, *constants)
    return sharded.forward(hidden, weight, targets, *constants, None)


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = hidden.new_empty(hidden.shape if with_hidden else (0,))
    dweight = weight.new_empty(weight.shape if with_weight else (0,), dtype=dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty((), dtype=dtype), dhidden, dweight


@torch.library.custom_op("plait::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dtotal: Tensor, dhidden: Tensor, dweight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return eager.backward(dtotal, dhidden, dweight, weight_dtype)


@_backward.register_fake
def _(dtotal: Tensor, dhidden: Tensor, dweight: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dhidden.new_empty(dhidden.shape), dweight.new_empty(dweight.shape, dtype=weight_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, _, _, ctx.with_hidden, ctx.with_weight = inputs
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx: Any, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 7
    dhidden, dweight = _backward(dtotal, *ctx.saved_tensors, ctx.weight_dtype)
    gradients = dhidden if ctx.with_hidden else None, dweight if ctx.with_weight else None
    return *gradients, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.plait.linear_cross_entropy)
def _flops(
    hidden_shape: torch.Size,
    weight_shape: torch.Size,
    targets_shape: torch.Size,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
    **_: Any,
) -> int:
    """One product for the logits and one for each gradient; the backward has none left."""
    T, D = hidden_shape
    return 2 * T * D * weight_shape[0] * (1 + with_hidden + with_weight)
