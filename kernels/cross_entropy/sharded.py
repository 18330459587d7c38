"""The loss where each of several ranks holds some rows of the head: each has its logits of every token.

A chunk's ranks tell each other two numbers a token, the log-sum-exp of their logits and the target's
logit, and each then writes its columns of the gradient of the logits by itself. The passes over the logits
are those of sharded_eager.py, or of the Triton form, which takes this way on one rank too.
"""

# T tokens, D width, V rows of the head on this rank, M tokens of a chunk, R ranks

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms import form_of
from . import eager, sharded_eager

__all__ = [
    "VocabularyShard",
    "check_shapes",
    "exchange",
    "form_for",
    "forward",
    "linear_cross_entropy",
    "losses",
    "most_rows",
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


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
    shard: VocabularyShard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.forward`, of these rows of the head, or of all of them without a shard."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    matrix_VD = eager.to_multiply(weight_VD, hidden_TD)
    first = 0 if shard is None else shard.first
    form = form_for(hidden_TD)
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape if with_hidden else (0,))
    dweight_VD = weight_VD.new_zeros(weight_VD.shape if with_weight else (0,), dtype=dtype)
    lse_T = hidden_TD.new_zeros(len(hidden_TD), dtype=dtype)
    cross_entropy_T = torch.zeros_like(lse_T)
    for index_M, hidden_MD, logits_MV in form.chunks(hidden_TD, matrix_VD, targets_T, chunk_tokens):
        targets_M = targets_T[index_M]
        lse_M, target_M = exchange(form.reduce_logits(logits_MV, targets_M, first), shard)
        lse_T[index_M], cross_entropy_T[index_M] = losses(lse_M, target_M, targets_M)
        if with_hidden or with_weight:
            form.write_gradient(logits_MV, targets_M, lse_M, z_loss, first)
        if with_hidden:
            dhidden_TD[index_M] = (logits_MV @ matrix_VD).to(dhidden_TD.dtype)
        if with_weight:
            eager.add_product(dweight_VD, logits_MV, hidden_MD)
    cross_entropy = cross_entropy_T.sum()
    return cross_entropy + z_loss * lse_T.square().sum(), cross_entropy, dhidden_TD, dweight_VD


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
        constants = z_loss, chunk_tokens, with_hidden, with_weight, shard
        total, cross_entropy, *gradients = forward(hidden_TD, weight_VD, targets_T, *constants)
        ctx.with_hidden, ctx.with_weight, ctx.weight_dtype = with_hidden, with_weight, weight_VD.dtype
        ctx.mark_non_differentiable(cross_entropy)
        ctx.save_for_backward(*gradients)
        return total, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        dhidden, dweight = eager.backward(dtotal, dhidden_TD, dweight_VD, ctx.weight_dtype)
        gradients = dhidden if ctx.with_hidden else None, dweight if ctx.with_weight else None
        return *gradients, None, None, None, None, None, None


def form_for(hidden_TD: Tensor) -> ModuleType:
    """What cuts tokens into chunks and passes over their logits."""
    if form_of(hidden_TD) == "torch":
        return sharded_eager
    from . import triton

    return triton


def losses(lse_M: Tensor, target_M: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the cross entropy, 0 of tokens without a target."""
    none_M = targets_M == eager.IGNORED
    return lse_M.masked_fill(none_M, 0), (lse_M - target_M).masked_fill(none_M, 0)


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
