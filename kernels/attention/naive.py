"""Causal attention as its formula, with the whole matrix of scores: the executable specification."""

import torch
from torch import Tensor

__all__ = ["causal_attention_naive"]


def causal_attention_naive(
    q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, *, document_ids_BL: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the tokens up to each query's own, in its document.

    Args:
        q_BLHd: H query heads; head h reads key and value head ``h // (H / K)``.

    Returns:
        (B, L, H, d).
    """
    length, heads, head_dim = q_BLHd.shape[1:]
    repeat = heads // k_BLKd.shape[2]
    k, v = k_BLKd.repeat_interleave(repeat, dim=2), v_BLKd.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q_BLHd, k) / head_dim**0.5
    allowed = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if document_ids_BL is not None:
        allowed = allowed & (document_ids_BL[:, None, :, None] == document_ids_BL[:, None, None, :])
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)
