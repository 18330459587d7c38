"""Causal attention as its formula, with the whole matrix of scores: the executable specification."""

import torch
from torch import Tensor

__all__ = ["causal_attention_naive"]


def causal_attention_naive(
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    *,
    document_ids_BS: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the tokens up to each query's own, in its document.

    Args:
        q_BLHd: H query heads of the tokens ``[offset, offset + L)`` of the S; head h reads key and value
            head ``h // (H / K)``.

    Returns:
        (B, L, H, d).
    """
    length, heads, head_dim = q_BLHd.shape[1:]
    repeat = heads // k_BSKd.shape[2]
    k, v = k_BSKd.repeat_interleave(repeat, dim=2), v_BSKd.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q_BLHd, k) / head_dim**0.5
    key = torch.arange(k.shape[1], device=scores.device)
    query = key[offset : offset + length]
    allowed = query[:, None] >= key
    if document_ids_BS is not None:
        own = document_ids_BS[:, offset : offset + length]
        allowed = allowed & (own[:, None, :, None] == document_ids_BS[:, None, None, :])
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)
