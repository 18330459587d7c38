"""Causal attention with grouped queries, over whole sequences or packed documents.

`naive.py` is the specification. A whole sequence goes to torch's own scaled dot product attention;
packed documents, for which it would need an L x L mask, go to `eager.py`. `step.py` takes one token
after another.
"""

import torch.nn.functional as F
from torch import Tensor

from .eager import attention as _attention
from .naive import causal_attention_naive
from .step import attention_step

__all__ = ["attention_step", "causal_attention", "causal_attention_naive"]


def causal_attention(
    q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, *, document_ids_BL: Tensor | None = None
) -> Tensor:
    """Attend to the tokens up to one's own, in one's own document.

    Args:
        q_BLHd: queries of H heads.
        k_BLKd, v_BLKd: keys and values of K heads, where K divides H.
        document_ids_BL: non-decreasing integers; None is one document.

    Returns:
        (B, L, H, d) in q's dtype.
    """
    if document_ids_BL is not None:
        return _attention(q_BLHd, k_BLKd, v_BLKd, document_ids_BL)[0]
    repeat = q_BLHd.shape[2] // k_BLKd.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) if repeat > 1 else t for t in (k_BLKd, v_BLKd))
    out = F.scaled_dot_product_attention(
        q_BLHd.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    return out.transpose(1, 2)
