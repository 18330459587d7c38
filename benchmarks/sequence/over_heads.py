"""A Mamba-2 layer under sequence parallelism by all-to-all over heads, as Megatron-LM has it.

Between the projections and the output projection each rank has whole sequences of H / R heads:

    projections      z x B C dt of T tokens      every rank, all heads
    all-to-all       (T, all heads) -> (R T, H / R heads); ranks that share a group get copies of B and C
    convolution, scan                            the rank's own slice of their parameters
    all-to-all       y, and z, which the norm wants   (R T, H / R heads) -> (T, all heads)
    gated norm, output projection                every rank, all heads

z takes no part in between. Megatron-LM sends it there and back; `send_z` False leaves it at home.

Shapes: B batch, T tokens of a rank, R ranks, C channels, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.kernels import ssd
from plait.kernels.convolution import causal_convolution
from plait.kernels.normalization import gated_rms_norm
from plait.parallel.collectives import all_to_all
from plait.parallel.mesh import Axis
from plait.pretrain.model.layers import exact
from plait.pretrain.model.mamba2 import Mamba2

__all__ = ["mamba_over_heads"]


def mamba_over_heads(mixer: Mamba2, x_BTD: Tensor, axis: Axis, *, send_z: bool) -> Tensor:
    """What `Mamba2.forward` computes of one document.

    Args:
        axis: divides the heads, and divides or is a multiple of the groups.
    """
    config, ranks = mixer.config, axis.size
    copies = max(1, ranks // config.num_groups)
    z = mixer.z_proj(x_BTD)
    dt = F.linear(exact(x_BTD), exact(mixer.dt_proj.weight)).to(x_BTD.dtype)
    b, c = (_copied(proj(x_BTD), config.num_groups, copies) for proj in (mixer.b_proj, mixer.c_proj))
    parts = [mixer.x_proj(x_BTD), b, c, dt, *([z] if send_z else [])]
    x, b, c, dt, *far_z = _to_heads(parts, axis)

    own = _Own(axis.place, ranks)
    x = own.convolve(x, mixer.x_conv.weight, mixer.x_conv.bias)
    group = _Own(axis.place // copies, ranks // copies)
    b = group.convolve(b, mixer.b_conv.weight, mixer.b_conv.bias)
    c = group.convolve(c, mixer.c_conv.weight, mixer.c_conv.bias)
    y_BLHP, _ = ssd.ssd(
        x.unflatten(-1, (-1, config.head_dim)),
        exact(dt),
        -torch.exp(exact(own.rows(mixer.A_log))),
        b.unflatten(-1, (-1, config.d_state)),
        c.unflatten(-1, (-1, config.d_state)),
        D_H=own.rows(mixer.D),
        dt_bias_H=own.rows(mixer.dt_bias),
        dt_limit=config.dt_limit,
        chunk_size=config.chunk_size,
    )
    y, *near_z = _to_tokens([y_BLHP.flatten(2), *far_z], axis)
    z = near_z[0] if near_z else z
    return mixer.out_proj(gated_rms_norm(y, z, mixer.norm.weight, mixer.norm_eps, config.num_groups))


class _Own:
    """One of several equal runs of a parameter's rows."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def rows(self, parameter: Tensor) -> Tensor:
        return parameter.chunk(self.count)[self.index]

    def convolve(self, x_BLC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return causal_convolution(x_BLC, self.rows(weight), self.rows(bias), activation="silu")


def _copied(x_BTC: Tensor, groups: int, copies: int) -> Tensor:
    """Each group's channels as often as ranks share it, one copy after another."""
    if copies == 1:
        return x_BTC
    return x_BTC.unflatten(-1, (groups, -1)).repeat_interleave(copies, dim=2).flatten(2)


def _to_heads(parts_BTC: list[Tensor], axis: Axis) -> list[Tensor]:
    """Tokens of this rank, all channels -> all tokens, this rank's run of each part's channels."""
    ranks = axis.size
    cut = [part.unflatten(-1, (ranks, -1)) for part in parts_BTC]
    sent_RBTC = torch.cat(cut, dim=-1).permute(2, 0, 1, 3)
    got = all_to_all(sent_RBTC, axis, [1] * ranks, [1] * ranks)
    return list(got.transpose(0, 1).flatten(1, 2).split([part.shape[-1] for part in cut], dim=-1))


def _to_tokens(parts_BLC: list[Tensor], axis: Axis) -> list[Tensor]:
    """The way back."""
    ranks = axis.size
    sent_RBTC = torch.cat(parts_BLC, dim=-1).unflatten(1, (ranks, -1)).transpose(0, 1)
    got_BTRC = all_to_all(sent_RBTC, axis, [1] * ranks, [1] * ranks).permute(1, 2, 0, 3)
    return [part.flatten(2) for part in got_BTRC.split([part.shape[-1] for part in parts_BLC], dim=-1)]
