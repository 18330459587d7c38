"""The gated norm of one group of channels that several ranks share, the sums over them by the caller.

A token's sum over the group crosses ranks once each way: ``Σ_d h²`` forward, ``Σ_d dy·w·r·h`` backward.
Each falls between two passes over the tokens, of split_eager.py or of the Triton form.
"""

# T tokens, D channels of the group on this rank; the group's dim of eager.py is one

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms import form_of
from . import eager, split_eager

__all__ = ["gated_rms_norm_split"]

SumOverRanks = Callable[[Tensor], Tensor]


def gated_rms_norm_split(
    x: Tensor,
    z: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    width: int,
    sum_over_ranks: SumOverRanks,
) -> Tensor:
    """`gated_rms_norm` in one group of which x, z and weight hold this rank's channels.

    Args:
        x: ``(…, D)``.
        z: the gate, shaped as x.
        weight_D: ``(D,)``, any floating dtype; it multiplies in fp32 at least.
        eps: added to the group's mean square.
        width: channels of the whole group.
        sum_over_ranks: sums a tensor ``(T, 1)``, fp32 at least, over the ranks that share the group. It
            is called once in the forward and once in the backward, and needs no gradient of its own.

    Returns:
        The shape and dtype of x, rounded once at the end.

    Raises:
        ValueError: the shapes do not fit together, or the group is narrower than x.
    """
    if z.shape != x.shape or weight_D.shape != x.shape[-1:]:
        shapes = f"weight is {tuple(weight_D.shape)}, x {tuple(x.shape)}, z {tuple(z.shape)}"
        raise ValueError(f"gated_rms_norm_split: {shapes}")
    if width < x.shape[-1]:
        raise ValueError(f"gated_rms_norm_split: width = {width}, x has {x.shape[-1]} channels")
    return _Split.apply(x, z, weight_D, eps, width, sum_over_ranks)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight_D: Tensor, eps: float, width: int, sum_over_ranks: SumOverRanks
    ) -> Tensor:
        form = _form(x)
        # A copy: what the caller returns is the caller's.
        r_T11 = sum_over_ranks(form.squares(x, z)[:, 0])[:, None].clone()
        eager.make_reciprocals(r_T11, width, eps)
        ctx.width, ctx.sum_over_ranks = width, sum_over_ranks
        ctx.save_for_backward(x, z, weight_D, r_T11)
        return form.output(x, z, weight_D, r_T11)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight_D, r_T11 = ctx.saved_tensors
        form = _form(x)
        dot_T11 = form.dot_products(dy, x, z, weight_D, r_T11)
        mean_T11 = ctx.sum_over_ranks(dot_T11[:, 0])[:, None].div(ctx.width)
        return *form.gradients(dy, x, z, weight_D, r_T11, mean_T11), None, None, None


def _form(x: Tensor) -> ModuleType:
    """What makes the parts between the exchanges."""
    if form_of(x) == "torch":
        return split_eager
    from . import triton

    return triton if triton.fits(x, 1) else split_eager
