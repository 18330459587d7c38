"""The loss where each of several ranks holds some rows of the head: each has its logits of every token.

A chunk's ranks tell each other two numbers a token, the log-sum-exp of their logits and the target's
logit, and each then writes its columns of the gradient of the logits by itself.
"""

# T tokens, D width, V rows of the head on this rank, N tokens that have a target, M tokens of a chunk,
# S tokens of a block, R ranks

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cache_blocks import block_rows
from . import eager

__all__ = [
    "VocabularyShard",
    "check_shapes",
    "exchange",
    "linear_cross_entropy",
    "most_rows",
    "reduce_logits",
]


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the head a rank holds; each rank holds at least one."""

    first: int
    """The id of this rank's first row."""
    rows: int
    """The most rows that any of the ranks holds, so that all cut their tokens into the same chunks."""
    gather: Callable[[Tensor], Tensor]
    """``(n, M) -> (R, n, M)``: the ranks' tensors stacked in the order of their rows, the same on each.

    Called once a chunk by every rank; it needs no gradient.
    """


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
    shard: VocabularyShard,
) -> tuple[Tensor, Tensor]:
    """``(total, cross_entropy)`` of the whole head; see `operators.linear_cross_entropy`."""
    return _Sharded.apply(
        hidden_TD, weight_VD, targets_T, z_loss, chunk_tokens, with_hidden, with_weight, shard
    )


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        z_loss: float,
        chunk_tokens: int,
        with_hidden: bool,
        with_weight: bool,
        shard: VocabularyShard,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        matrix_VD = weight_VD.to(hidden_TD.dtype)
        index_N = (targets_T != eager.IGNORED).nonzero()[:, 0]
        lse_N = hidden_TD.new_empty(len(index_N), dtype=dtype)
        cross_entropy_N = torch.empty_like(lse_N)
        dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape if with_hidden else (0,))
        dweight_VD = weight_VD.new_zeros(weight_VD.shape if with_weight else (0,), dtype=dtype)
        for chunk, hidden_MD, logits_MV in eager.chunks(hidden_TD, matrix_VD, index_N, chunk_tokens):
            index_M = index_N[chunk]
            targets_M = targets_T[index_M]
            lse_M, target_M = exchange(reduce_logits(logits_MV, targets_M, shard.first), shard)
            lse_N[chunk], cross_entropy_N[chunk] = lse_M, lse_M - target_M
            if with_hidden or with_weight:
                _write_gradient(logits_MV, targets_M, lse_M, z_loss, shard.first)
            if with_hidden:
                dhidden_TD.index_copy_(0, index_M, logits_MV @ matrix_VD)
            if with_weight:
                eager.add_product(dweight_VD, logits_MV, hidden_MD)
        cross_entropy = cross_entropy_N.sum()
        ctx.with_hidden, ctx.with_weight, ctx.weight_dtype = with_hidden, with_weight, weight_VD.dtype
        ctx.mark_non_differentiable(cross_entropy)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        return cross_entropy + z_loss * lse_N.square().sum(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        dhidden, dweight = eager.backward(dtotal, dhidden_TD, dweight_VD, ctx.weight_dtype)
        gradients = dhidden if ctx.with_hidden else None, dweight if ctx.with_weight else None
        return *gradients, None, None, None, None, None, None


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


def exchange(local_2M: Tensor, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit (M,) over all rows of the head."""
    if shard is None:
        return local_2M[0], local_2M[1]
    lse_RM, target_RM = shard.gather(local_2M).unbind(1)
    return lse_RM.logsumexp(0), target_RM.amax(0)


def check_shapes(
    caller: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, shard: VocabularyShard | None
) -> None:
    """Raise the ValueError that linear_cross_entropy and token_cross_entropy promise."""
    T, D = hidden_TD.shape
    V = weight_VD.shape[0]
    if weight_VD.shape != (V, D) or targets_T.shape != (T,):
        shapes = f"hidden {T, D}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_T.shape)}"
        raise ValueError(f"{caller}: {shapes}")
    if shard is not None and not 1 <= V <= shard.rows:
        raise ValueError(f"{caller}: weight {V, D}, not 1 to {shard.rows} rows of a shard")


def most_rows(weight_VD: Tensor, shard: VocabularyShard | None) -> int:
    """The rows that a chunk's logits are measured by."""
    return len(weight_VD) if shard is None else shard.rows


def _write_gradient(logits_MV: Tensor, targets_M: Tensor, lse_M: Tensor, z_loss: float, first: int) -> None:
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
