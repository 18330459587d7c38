"""The passes over a chunk's logits between which ranks exchange, in torch operators."""

# D width, V rows of the head on this rank, M tokens of a chunk, S tokens of a block

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cache_blocks import block_rows
from . import eager

__all__ = ["chunks", "reduce_logits", "write_gradient"]


def chunks(
    hidden_TD: Tensor, matrix_VD: Tensor, targets_T: Tensor, chunk_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of the tokens that have a target, a chunk at a time, their places (M,), hidden and logits."""
    for _, *of_chunk in eager.chunks(hidden_TD, matrix_VD, eager.with_target(targets_T), chunk_tokens):
        index_M, hidden_MD, logits_MV = of_chunk
        yield index_M, hidden_MD, logits_MV


def reduce_logits(logits_MV: Tensor, targets_M: Tensor, first: int) -> Tensor:
    """``(2, M)``, at least fp32: the log-sum-exp of these rows, and the target's logit, -inf if elsewhere."""
    dtype = torch.promote_types(logits_MV.dtype, torch.float32)
    local_2M = logits_MV.new_empty(2, len(logits_MV), dtype=dtype)
    for rows, column_S1, here_S1 in _blocks(logits_MV, targets_M, first):
        logits_SV = logits_MV[rows].to(dtype)
        # Faster than logsumexp, which makes its exponentials in several steps.
        lse_S1 = eager.log_sum_exp(logits_SV, torch.softmax(logits_SV, -1))
        target_S1 = logits_SV.gather(-1, column_S1).masked_fill_(~here_S1, -torch.inf)
        local_2M[:, rows] = torch.stack((lse_S1[:, 0], target_S1[:, 0]))
    return local_2M


def write_gradient(logits_MV: Tensor, targets_M: Tensor, lse_M: Tensor, z_loss: float, first: int) -> None:
    """Put the gradient of the logits in their place."""
    for rows, column_S1, here_S1 in _blocks(logits_MV, targets_M, first):
        lse_S1 = lse_M[rows, None]
        p_SV = (logits_MV[rows] - lse_S1).exp_()
        if z_loss:
            p_SV.mul_(1 + 2 * z_loss * lse_S1)
        p_SV.scatter_(-1, column_S1, p_SV.gather(-1, column_S1) - here_S1.to(p_SV.dtype))
        logits_MV[rows] = p_SV


def _blocks(logits_MV: Tensor, targets_M: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of tokens that fit the cache, each target's column, and whether it is among these at all."""
    M, V = logits_MV.shape
    column_M1 = targets_M[:, None] - first
    here_M1 = (column_M1 >= 0) & (column_M1 < V)
    column_M1 = column_M1.clamp(0, V - 1)
    size = block_rows(M, V, logits_MV.device)
    for start in range(0, M, size):
        rows = slice(start, start + size)
        yield rows, column_M1[rows], here_M1[rows]
