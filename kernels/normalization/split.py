"""The gated norm of one group of channels that several ranks share, the sums over them by the caller.

A token's sum over the group crosses ranks once each way: ``Σ_d h²`` forward, ``Σ_d dy·w·r·h`` backward.
Each falls between two passes over the tokens, and the second makes h again rather than keep it.
"""

# T tokens, S tokens of a block, D channels of the group on this rank; the group's dim of eager.py is one

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager

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
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_T1D, z_T1D = _one_group(x), _one_group(z)
        squares_T11 = x.new_empty(len(x_T1D), 1, 1, dtype=dtype)
        for rows in eager.blocks(x_T1D):
            eager.sum_squares(eager.gated(x_T1D[rows], z_T1D[rows], dtype), squares_T11[rows])
        # A copy: what the caller returns is the caller's.
        r_T11 = sum_over_ranks(squares_T11[:, 0])[:, None].clone()
        eager.make_reciprocals(r_T11, width, eps)
        y = x.new_empty(x.shape)
        y_T1D, w_1D = y.view(x_T1D.shape), weight_D.to(dtype)[None]
        for rows in eager.blocks(x_T1D):
            h_S1D = eager.gated(x_T1D[rows], z_T1D[rows], dtype)
            eager.write_output(y_T1D[rows], h_S1D, r_T11[rows], w_1D)
        ctx.width, ctx.sum_over_ranks = width, sum_over_ranks
        ctx.save_for_backward(x, z, weight_D, r_T11)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight_D, r_T11 = ctx.saved_tensors
        dtype = r_T11.dtype
        dy_T1D, x_T1D, z_T1D = _one_group(dy), _one_group(x), _one_group(z)
        w_1D = weight_D.to(dtype)[None]
        dw_1D = torch.zeros_like(w_1D)
        dot_T11 = torch.empty_like(r_T11)
        for rows in eager.blocks(x_T1D):
            h_S1D = eager.gated(x_T1D[rows], z_T1D[rows], dtype)
            _, dot_T11[rows] = eager.add_up_products(dy_T1D[rows], h_S1D, w_1D, r_T11[rows], dw_1D)
        mean_T11 = ctx.sum_over_ranks(dot_T11[:, 0])[:, None].div(ctx.width)
        dx, dz = x.new_empty(x.shape), z.new_empty(z.shape)
        dx_T1D, dz_T1D = dx.view(x_T1D.shape), dz.view(x_T1D.shape)
        for rows in eager.blocks(x_T1D):
            x_S1D, z_S1D, r_S11 = x_T1D[rows].to(dtype), z_T1D[rows].to(dtype), r_T11[rows]
            gate_S1D = F.silu(z_S1D)
            dyr_S1D = dy_T1D[rows].to(dtype) * r_S11
            dh_S1D = eager.gradient_of_h(dyr_S1D, x_S1D * gate_S1D, w_1D, r_S11, mean_T11[rows])
            eager.write_gated_gradients(dx_T1D[rows], dz_T1D[rows], dh_S1D, x_S1D, z_S1D, gate_S1D)
        return dx, dz, dw_1D[0].to(weight_D.dtype), None, None, None


def _one_group(x: Tensor) -> Tensor:
    """(…, D) -> (T, 1, D)."""
    return x.reshape(-1, 1, x.shape[-1])
