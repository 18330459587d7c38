"""Causal attention over packed documents by blocks of queries, forward and backward by hand.

No L x S matrix ever exists: a block of queries meets the keys from the start of its oldest document
to its own last token, and the backward makes the weights again from the saved log-sum-exp. Masked
scores are -inf and weigh exactly zero, so a document's bits do not depend on its neighbours.

Shapes: B batch, L queries, S keys, H query heads, K key heads, R = H / K, d head dim, q a block of
queries, s the keys it meets. Query i is the token ``offset + i`` of the S.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["attention", "attention_backward"]

SCORE_ELEMENTS = 1 << 18
"""Scores a block of queries may have at once over all heads: 1 MB in fp32, within the L2 cache."""
LEAST_QUERIES = 16
"""A block has them even so: at 16384 keys of 8 heads this took half the time of blocks of 2 queries."""


def attention(
    q_BLHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, document_ids_BS: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, L, H, d) and the scores' log-sum-exp (B, H, L), at least fp32."""
    acc = torch.promote_types(q_BLHd.dtype, torch.float32)
    batch, length, heads, _ = q_BLHd.shape
    end = offset + length
    q, k, v = _by_key_head(q_BLHd, k_BSKd, acc), _up_to(end, k_BSKd, acc), _up_to(end, v_BSKd, acc)
    out = torch.empty_like(q_BLHd, memory_format=torch.contiguous_format)
    logsumexp = torch.empty(batch, heads, length, dtype=acc, device=q_BLHd.device)
    for queries, keys, mask in _blocks(q_BLHd, document_ids_BS, offset):
        scores = _scores(q[..., queries, :], k[:, :, keys], mask)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_()
        block = weights.flatten(2, 3) @ v[:, :, keys]
        out[:, queries] = _by_query_head(block, heads)
        logsumexp[:, :, queries] = lse.view(batch, heads, -1)
    return out, logsumexp


def attention_backward(
    grad_out_BLHd: Tensor,
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    out_BLHd: Tensor,
    logsumexp_BHL: Tensor,
    document_ids_BS: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their dtypes."""
    acc = logsumexp_BHL.dtype
    heads, key_heads = q_BLHd.shape[2], k_BSKd.shape[2]
    end, scale = offset + q_BLHd.shape[1], q_BLHd.shape[3] ** -0.5
    q, k, v = _by_key_head(q_BLHd, k_BSKd, acc), _up_to(end, k_BSKd, acc), _up_to(end, v_BSKd, acc)
    grad_out = _by_key_head(grad_out_BLHd, k_BSKd, acc)
    delta = (grad_out * _by_key_head(out_BLHd, k_BSKd, acc)).sum(-1, keepdim=True)
    logsumexp = logsumexp_BHL.unflatten(1, (key_heads, -1))[..., None]
    grad_q = torch.empty_like(q_BLHd, memory_format=torch.contiguous_format)
    grad_k_BSKd, grad_v_BSKd = (t.new_zeros(t.shape, dtype=acc) for t in (k_BSKd, v_BSKd))
    grad_k, grad_v = grad_k_BSKd.transpose(1, 2), grad_v_BSKd.transpose(1, 2)
    for queries, keys, mask in _blocks(q_BLHd, document_ids_BS, offset):
        q_block, grad_block = q[..., queries, :], grad_out[..., queries, :].flatten(2, 3)
        weights = _scores(q_block, k[:, :, keys], mask).sub_(logsumexp[..., queries, :]).exp_()
        grad_v[:, :, keys] += weights.flatten(2, 3).transpose(-1, -2) @ grad_block
        grad_weights = (grad_block @ v[:, :, keys].transpose(-1, -2)).view_as(weights)
        grad_scores = grad_weights.sub_(delta[..., queries, :]).mul_(weights).mul_(scale).flatten(2, 3)
        grad_q[:, queries] = _by_query_head(grad_scores @ k[:, :, keys], heads)
        grad_k[:, :, keys] += grad_scores.transpose(-1, -2) @ q_block.flatten(2, 3)
    return grad_q, grad_k_BSKd.to(k_BSKd.dtype), grad_v_BSKd.to(v_BSKd.dtype)


def _by_key_head(tensor_BLHd: Tensor, k_BSKd: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H, d) -> (B, K, R, L, d)."""
    return tensor_BLHd.unflatten(2, (k_BSKd.shape[2], -1)).permute(0, 2, 3, 1, 4).to(dtype)


def _up_to(end: int, tensor_BSKd: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S, K, d) -> (B, K, end, d): later keys meet no query."""
    return tensor_BSKd[:, :end].transpose(1, 2).to(dtype)


def _by_query_head(tensor_BKxd: Tensor, heads: int) -> Tensor:
    """(B, K, R q, d) -> (B, q, H, d)."""
    batch, _, _, head_dim = tensor_BKxd.shape
    return tensor_BKxd.reshape(batch, heads, -1, head_dim).transpose(1, 2)


def _scores(q_BKRqd: Tensor, k_BKsd: Tensor, mask_Bqs: Tensor) -> Tensor:
    """Scaled scores (B, K, R, q, s), -inf where the mask forbids."""
    scores = q_BKRqd.flatten(2, 3) @ k_BKsd.transpose(-1, -2)
    scores = scores.mul_(q_BKRqd.shape[-1] ** -0.5).view(*q_BKRqd.shape[:4], -1)
    return scores.masked_fill_(~mask_Bqs[:, None, None], -torch.inf)


def _blocks(
    q_BLHd: Tensor, document_ids_BS: Tensor | None, offset: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that each meets, and which of those each query may see (B, q, s)."""
    batch, length, heads, _ = q_BLHd.shape
    position = torch.arange(offset + length, device=q_BLHd.device)
    start = 0
    while start < length:
        place = offset + start
        first = 0
        if document_ids_BS is not None:
            same = document_ids_BS == document_ids_BS[:, place : place + 1]
            first = int(same.int().argmax(1).min())
        # Fewer queries a block where more keys lie before them.
        fitting = SCORE_ELEMENTS // (batch * heads * (place + 1))
        size = min(length - start, max(fitting, LEAST_QUERIES), 128)
        own, keys = slice(place, place + size), slice(first, place + size)
        mask = (position[own, None] >= position[None, keys])[None]
        if document_ids_BS is not None:
            mask = mask & (document_ids_BS[:, own, None] == document_ids_BS[:, None, keys])
        yield slice(start, start + size), keys, mask
        start += size
