"""``plait::attention`` and its backward, as torch knows them: flash.py where it fits, eager.py elsewhere."""

# B batch, L queries, S keys, H query heads, K key heads, d head dim

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import eager, flash

__all__ = ["attention"]


@torch.library.custom_op("plait::attention", mutates_args=())
def attention(
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    document_ids_BS: Tensor | None,
    offset: int,
    most_documents: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, L, H, d) and the scores' log-sum-exp (B, H, L), at least fp32.

    Args:
        most_documents: of a row; 0 where it is not known.
        longest: tokens of a document, at most; 0 where it is not known.
    """
    if flash.fits(q_BLHd):
        return flash.attention(q_BLHd, k_BSKd, v_BSKd, document_ids_BS, offset, most_documents, longest)
    return eager.attention(q_BLHd, k_BSKd, v_BSKd, document_ids_BS, offset)


@attention.register_fake
def _(q, k, v, document_ids, offset, most_documents=0, longest=0):
    acc = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("plait::attention_backward", mutates_args=())
def attention_backward(
    grad_out_BLHd: Tensor,
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    out_BLHd: Tensor,
    logsumexp_BHL: Tensor,
    document_ids_BS: Tensor | None,
    offset: int,
    most_documents: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their dtypes."""
    saved = q_BLHd, k_BSKd, v_BSKd, out_BLHd, logsumexp_BHL, document_ids_BS, offset
    if flash.fits(q_BLHd):
        return flash.attention_backward(grad_out_BLHd, *saved, most_documents, longest)
    return eager.attention_backward(grad_out_BLHd, *saved)


@attention_backward.register_fake
def _(grad_out, q, k, v, out, logsumexp, document_ids, offset, most_documents=0, longest=0):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, document_ids, *ctx.places = inputs
    ctx.save_for_backward(q, k, v, document_ids, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _grad_logsumexp):
    q, k, v, document_ids, out, logsumexp = ctx.saved_tensors
    gradients = attention_backward(grad_out, q, k, v, out, logsumexp, document_ids, *ctx.places)
    return *gradients, None, *(None for _ in ctx.places)


attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.plait.attention)
def _flops(q_shape, k_shape, v_shape, document_ids_shape, offset, *args, **kwargs) -> int:
    """Of attention to all that came before; documents only make it less."""
    batch, length, heads, head_dim = q_shape
    pairs = length * offset + length * (length + 1) // 2
    return 4 * batch * heads * pairs * head_dim


@register_flop_formula(torch.ops.plait.attention_backward)
def _backward_flops(grad_out_shape, q_shape, k_shape, v_shape, *saved, **kwargs) -> int:
    _, _, document_ids_shape, offset, *_ = saved
    return _flops(q_shape, k_shape, v_shape, document_ids_shape, offset) * 5 // 2
