"""Attention of one token to those before it: what generation does after the prompt."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_step"]


def attention_step(q_BHd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over all S tokens, or those that a row's mask allows.

    Args:
        q_BHd: one query of each of H heads; head h reads key and value head ``h // (H / K)``.
        k_BKSd, v_BKSd: keys and values of K heads, the token's own among them. Here the heads come
            before the tokens, so that a head's tokens lie together.
        mask_BS: True where a row's query may look; None is everywhere.

    Returns:
        (B, H, d) in q's dtype.
    """
    # The query heads of a key head stand as so many queries: no key is copied for them.
    q_BKRd = q_BHd.unflatten(1, (k_BKSd.shape[1], -1))
    mask = mask_BS[:, None, None] if mask_BS is not None else None
    return F.scaled_dot_product_attention(q_BKRd, k_BKSd, v_BKSd, attn_mask=mask).flatten(1, 2)
