"""Packed documents, and queries that start late, by torch's flash attention of sequences of varying length.

Each document of each row is a sequence; where keys go on after the last query, the document is cut there, so
that the queries of a sequence are its last tokens, as the kernel takes them. Where the documents begin is
found on the device: how many there are and how long must be told, or the host waits for the first and the
kernel is launched for the longest there could be.

Shapes: B batch, L queries, S keys, H query heads, K key heads, d head dim, N sequences over all rows. Query i
is the token ``offset + i`` of the S.
"""

from typing import Any

import torch
from torch import Tensor

from ..forms import setting

__all__ = ["attention", "attention_backward", "fits", "sequences"]

DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 192
"""Some GPUs have no backward beyond it."""


def fits(q_BLHd: Tensor) -> bool:
    """Whether the kernel takes such heads on this device, and none other was asked for."""
    return (
        q_BLHd.device.type == "cuda"
        and torch.version.hip is None
        and setting() != "torch"
        and q_BLHd.dtype in DTYPES
        and q_BLHd.shape[-1] % 8 == 0
        and q_BLHd.shape[-1] <= WIDEST_HEAD
    )


def attention(
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    document_ids_BS: Tensor | None,
    offset: int,
    most_documents: int,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`..eager.attention`."""
    batch, length, heads, _ = q_BLHd.shape
    bounds = sequences(document_ids_BS, k_BSKd, length, offset, most_documents, longest)
    rows = q_BLHd.flatten(0, 1), k_BSKd.flatten(0, 1), v_BSKd.flatten(0, 1)
    out, logsumexp, *_ = FORWARD(*rows, *bounds, 0.0, True, False)
    return out.view(q_BLHd.shape), logsumexp.reshape(heads, batch, length).transpose(0, 1).contiguous()


def attention_backward(
    grad_out_BLHd: Tensor,
    q_BLHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    out_BLHd: Tensor,
    logsumexp_BHL: Tensor,
    document_ids_BS: Tensor | None,
    offset: int,
    most_documents: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`..eager.attention_backward`; torch.use_deterministic_algorithms makes its sums ordered."""
    bounds = sequences(document_ids_BS, k_BSKd, q_BLHd.shape[1], offset, most_documents, longest)
    rows = (t.flatten(0, 1) for t in (grad_out_BLHd.contiguous(), q_BLHd, k_BSKd, v_BSKd, out_BLHd))
    logsumexp = logsumexp_BHL.transpose(0, 1).flatten(1).contiguous()
    # Without dropout nothing is random: the state of the generator is not read.
    state, unused = (torch.zeros(n, dtype=torch.uint64, device=q_BLHd.device) for n in (2, 0))
    gradients = BACKWARD(*rows, logsumexp, *bounds, 0.0, True, state, unused)
    shapes = q_BLHd.shape, k_BSKd.shape, v_BSKd.shape
    dq, dk, dv = (gradient.view(shape) for gradient, shape in zip(gradients, shapes, strict=True))
    return dq, dk, dv


def sequences(
    document_ids_BS: Tensor | None,
    k_BSKd: Tensor,
    length: int,
    offset: int,
    most_documents: int,
    longest: int,
) -> tuple[Tensor, Tensor, int, int]:
    """Where each sequence begins among all rows' queries and keys, and the most of both that one has.

    Args:
        most_documents: of a row; 0 where it is not known.
        longest: tokens of a document, at most; 0 where it is not known.

    Returns:
        Two of (N + 1,) int32, of queries and keys, and two numbers. Sequences that are not there lie, without
        a token, at the end.
    """
    batch, tokens = k_BSKd.shape[:2]
    device, end = k_BSKd.device, offset + length
    begins_BS = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    if document_ids_BS is not None:
        begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    begins_BS[:, 0] = True
    if end < tokens:
        begins_BS[:, end] = True
    if document_ids_BS is None:
        most_documents, longest = 1, end
    most = most_documents + 1 if most_documents else int(begins_BS.sum(1).max())
    number = torch.arange(1, batch * most + 2, device=device)
    counted = begins_BS.flatten().cumsum(0)
    keys_N = torch.searchsorted(counted, number)
    queries_N = keys_N // tokens * length + (keys_N % tokens - offset).clamp(0, length)
    longest = longest or end
    # Told that no sequence has two queries, the kernel would take it that each has one.
    return queries_N.int(), keys_N.int(), max(2, min(length, longest)), min(end, longest)


FORWARD: Any = torch.ops.aten._flash_attention_forward
BACKWARD: Any = torch.ops.aten._flash_attention_backward
