"""Causal attention with grouped queries, over whole sequences or packed documents.

`naive.py` is the specification. A whole sequence goes to torch's own scaled dot product attention;
packed documents, for which it would need a mask of queries times keys, go to `operators.py`, and so do on
the CPU the later queries of a sequence, whose mask is no square: on a CUDA GPU in half precision to torch's
flash attention (`flash.py`), elsewhere to blocks of queries (`eager.py`). `step.py` takes one token after
another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import product_dtype
from .naive import causal_attention_naive
from .operators import attention as _attention
from .step import attention_step

__all__ = ["attention_step", "causal_attention", "causal_attention_naive"]


def causal_attention(
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    *,
    document_ids_BS: Tensor | None = None,
    offset: int = 0,
    most: tuple[int, int] = (0, 0),
) -> Tensor:
    """Attend to the tokens up to one's own, in one's own document.

    Args:
        q_BLHd: queries of H heads: those of the tokens ``[offset, offset + L)`` of the S.
        k_BSKd, v_BSKd: keys and values of K heads, where K divides H. Those after the last query
            are seen by none.
        document_ids_BS: non-decreasing integers; None is one document.
        offset: the tokens before the first query.
        most: documents of a row and tokens of a document, at most; 0 where it is not known. On a GPU the
            host then need not wait for it.

    Returns:
        (B, L, H, d) in q's dtype.

    Raises:
        ValueError: the keys or the document ids are not those of all the queries' tokens.
    """
    end = offset + q_BLHd.shape[1]
    if offset < 0 or end > k_BSKd.shape[1]:
        raise ValueError(f"causal_attention: queries [{offset}, {end}) of {k_BSKd.shape[1]} keys")
    if document_ids_BS is not None and document_ids_BS.shape != k_BSKd.shape[:2]:
        shapes = f"document ids {tuple(document_ids_BS.shape)}, keys {tuple(k_BSKd.shape)}"
        raise ValueError(f"causal_attention: {shapes}")
    # With an offset torch would make the mask where it has no kernel for it: on the CPU, and in float64.
    masked = offset > 0 and (q_BLHd.device.type != "cuda" or q_BLHd.dtype == torch.float64)
    if document_ids_BS is not None or masked:
        return _attention(q_BLHd, k_BSKd, v_BSKd, document_ids_BS, offset, *most)[0]
    repeat = q_BLHd.shape[2] // k_BSKd.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q_BLHd, k_BSKd[:, :end], v_BSKd[:, :end]))
    if q.device.type == "cuda" and not offset:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeat > 1).transpose(1, 2)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if (wide := product_dtype(q)) != q.dtype:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if offset:
        # Two seconds of imports, torch's compiler among them: for those who need it.
        from torch.nn.attention.bias import causal_lower_right

        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], end))
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).to(q_BLHd.dtype)
