"""Causal attention over a sequence that is cut over `sp`: keys and values are gathered, queries stay.

A late shard's queries see more keys than an early one's. So ranks r and R-1-r trade the second halves
of their queries, compute, and trade the outputs back: each then has an early half and a late one, and
all the same causal work. Under packed documents the work is what the documents leave.

Shapes: B batch, L tokens of this shard, S = R L tokens of the sequence, H query heads, K key heads, d
head dim.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import causal_attention
from .mesh import Mesh
from .travel import Travelling, start_all_gather, swap_later

__all__ = ["attend", "send_keys"]


def send_keys(k_BLKd: Tensor, v_BLKd: Tensor, mesh: Mesh) -> Travelling | tuple[Tensor, Tensor]:
    """Start gathering this shard's keys and values; what is computed before `attend` hides it."""
    if mesh.sp.size == 1:
        return k_BLKd, v_BLKd
    return start_all_gather(torch.stack([k_BLKd, v_BLKd], dim=2), mesh.sp)


def attend(
    q_BLHd: Tensor,
    keys: Travelling | tuple[Tensor, Tensor],
    mesh: Mesh,
    *,
    document_ids_BS: Tensor | None,
    most: tuple[int, int] = (0, 0),
) -> Tensor:
    """Attend to the tokens of the whole sequence up to one's own, in one's own document.

    Args:
        q_BLHd: of this rank's tokens.
        keys: of `send_keys`.
        document_ids_BS: of all tokens; None is one document.
        most: documents of a row and tokens of a document, at most; 0 where it is not known.

    Returns:
        (B, L, H, d) in q's dtype.
    """
    if isinstance(keys, tuple):
        return causal_attention(q_BLHd, *keys, document_ids_BS=document_ids_BS, most=most)
    axis, length = mesh.sp, q_BLHd.shape[1]
    partner, half = axis.size - 1 - axis.place, length // 2
    folds = mesh.fold_queries and partner != axis.place and half > 0
    kept = length - half if folds else length
    late = swap_later(q_BLHd[:, kept:], axis, partner) if folds else None
    # (R, B, L, 2, K, d) -> two of (B, R L, K, d), without a copy where B = 1.
    k_BSKd, v_BSKd = keys.wait().transpose(0, 1).flatten(1, 2).unbind(2)
    here = axis.place * length
    documents: Any = {"document_ids_BS": document_ids_BS, "most": most}
    out = causal_attention(q_BLHd[:, :kept], k_BSKd, v_BSKd, offset=here, **documents)
    if late is None:
        return out
    there = partner * length + kept
    theirs = causal_attention(late.wait(), k_BSKd, v_BSKd, offset=there, **documents)
    return torch.cat([out, swap_later(theirs, axis, partner).wait()], dim=1)
