"""The Mamba-2 mixer, ``M`` (arXiv 2405.21060), with one matrix a role.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width, K taps of the
convolution, C its channels, I inner width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ssd
from ...kernels.convolution import causal_convolution, convolution_step
from ...kernels.normalization import gated_rms_norm, gated_rms_norm_split
from ...parallel.collectives import all_gather, reduce_scatter, sum_in_place
from ...parallel.halo import send_halo
from ...parallel.mesh import Mesh
from ...parallel.placements import local
from ..config import MambaConfig
from .layers import Cache, Kept, Linear, Mixer, Packing, Report, WeightOf, exact, shared_rows
from .parameters import Constant, LogUniformA, LogUniformStep, Normal, Uniform, declare

__all__ = ["Mamba2"]


@dataclass
class Mamba2Cache(Cache):
    state_BHPN: Tensor
    """At least fp32."""
    x_tail_BKC: Tensor
    """The convolution's last K-1 inputs, the nearest last; zero where they are of another document."""
    b_tail_BKC: Tensor
    c_tail_BKC: Tensor


class Mamba2(Mixer):
    """Tensor parallelism cuts its heads, and its groups while there are as many; ranks that share a group
    each hold b and c whole and use their group's rows."""

    def __init__(
        self, d_model: int, config: MambaConfig, norm_eps: float, std: float, out_std: float, mesh: Mesh
    ) -> None:
        super().__init__()
        self.config, self.norm_eps, self.mesh = config, norm_eps, mesh
        inner, shared = config.d_inner, config.num_groups * config.d_state
        self._sharers = max(1, mesh.tp.size // config.num_groups)
        """Ranks of tp that have one group between them."""
        group = 0 if self._sharers == 1 else None
        self.z_proj = Linear(d_model, inner, Normal(std), tp_dim=0)
        self.x_proj = Linear(d_model, inner, Normal(std), tp_dim=0)
        self.b_proj = Linear(d_model, shared, Normal(std), tp_dim=group)
        self.c_proj = Linear(d_model, shared, Normal(std), tp_dim=group)
        self.dt_proj = Linear(d_model, config.num_heads, Normal(std), tp_dim=0)
        # As a convolution of d_conv taps on one channel starts by default: within 1/sqrt(fan-in).
        taps = Uniform(config.d_conv**-0.5)
        self.x_conv = WeightOf((inner, config.d_conv), taps, bias=taps, tp_dim=0)
        self.b_conv = WeightOf((shared, config.d_conv), taps, bias=taps, tp_dim=group)
        self.c_conv = WeightOf((shared, config.d_conv), taps, bias=taps, tp_dim=group)
        self.A_log = declare(self, "A_log", (config.num_heads,), LogUniformA(), tp_dim=0)
        self.D = declare(self, "D", (config.num_heads,), Constant(1.0), tp_dim=0)
        self.dt_bias = declare(self, "dt_bias", (config.num_heads,), LogUniformStep(), tp_dim=0)
        self.norm = WeightOf((inner,), Constant(1.0), tp_dim=0)
        self.out_proj = Linear(inner, d_model, Normal(out_std), tp_dim=1)

    def forward(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Report]:
        tp, sp = self.mesh.tp, self.mesh.sp
        y_BLD, state = self._scan(all_gather(x_BLD, tp, dim=1), packing, kept)
        rows = packing.cut.rows if packing.cut else None
        square = state.detach()[:rows].square().sum()
        if sp.place < sp.size - 1:
            square = torch.zeros_like(square)
        return reduce_scatter(y_BLD, tp, dim=1), Report(state_square=square)

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Mamba2Cache]:
        y_BLD, state = self._scan(x_BLD, packing, Kept(self.mesh))
        taps = self.config.d_conv - 1
        last = x_BLD[:, -taps:]
        if (own := packing.last_document_BL) is not None:
            # The projections have no bias, so a token of zeros is an input of zeros to the convolution.
            last = last * own[:, -taps:, None]
        last = F.pad(last, (0, 0, taps - last.shape[1], 0))
        return y_BLD, Mamba2Cache(state, self.x_proj(last), self.b_proj(last), self.c_proj(last))

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: Mamba2Cache) -> Tensor:
        config, x_BD = self.config, x_B1D[:, 0]
        x = convolution_step(self.x_proj(x_BD), cache.x_tail_BKC, self.x_conv.weight, self.x_conv.bias)
        b = convolution_step(self.b_proj(x_BD), cache.b_tail_BKC, self.b_conv.weight, self.b_conv.bias)
        c = convolution_step(self.c_proj(x_BD), cache.c_tail_BKC, self.c_conv.weight, self.c_conv.bias)
        y_BHP = ssd.ssd_step(
            cache.state_BHPN,
            x.unflatten(-1, (config.num_heads, config.head_dim)),
            F.linear(exact(x_BD), exact(self.dt_proj.weight)),
            -torch.exp(exact(self.A_log)),
            b.unflatten(-1, (config.num_groups, config.d_state)),
            c.unflatten(-1, (config.num_groups, config.d_state)),
            D_H=self.D,
            dt_bias_H=self.dt_bias,
            dt_limit=config.dt_limit,
        )
        z = self.z_proj(x_BD)
        y = gated_rms_norm(y_BHP.flatten(1), z, self.norm.weight, self.norm_eps, config.num_groups)
        return self.out_proj(y)[:, None]

    def _scan(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Tensor]:
        """The output before its sum over tp, and the states (B, H, P, N) after the shard's last token."""
        config, sp, documents = self.config, self.mesh.sp, packing.document_ids_BL
        halo = send_halo(x_BLD, config.d_conv - 1, documents, sp, kept.halo) if sp.size > 1 else None
        # Step sizes decide decays, so their product with x is not rounded to bf16.
        dt_BLH = F.linear(exact(x_BLD), exact(local(self.dt_proj.weight)))
        x, b = self.x_proj(x_BLD), self.b_proj(x_BLD, self._group_rows)
        before = halo.wait() if halo is not None else None
        x = self._convolve(x, self.x_proj, self.x_conv, documents, before)
        b = self._convolve(b, self.b_proj, self.b_conv, documents, before, self._group_rows)

        length = x_BLD.shape[1]
        real = packing.cut.tokens if packing.cut else length
        groups = (-1, config.d_state)
        scan = ssd.begin(
            x[:, :real].unflatten(-1, (-1, config.head_dim)),
            dt_BLH[:, :real],
            -torch.exp(exact(local(self.A_log))),
            b[:, :real].unflatten(-1, groups),
            dt_bias_H=local(self.dt_bias),
            dt_limit=config.dt_limit,
            document_ids_BL=documents[:, :real] if documents is not None else None,
            chunk_size=config.chunk_size,
            exchange=kept.exchange,
        )
        # Between begin and finish stands work that needs no state: it hides the exchange of states.
        z = self.z_proj(x_BLD)
        c = self.c_proj(x_BLD, self._group_rows)
        c = self._convolve(c, self.c_proj, self.c_conv, documents, before, self._group_rows)
        y_BLHP, state = ssd.finish(scan, c[:, :real].unflatten(-1, groups), D_H=local(self.D))
        y_BLI = y_BLHP.flatten(2)
        if real < length:
            y_BLI = F.pad(y_BLI, (0, 0, 0, length - real))
        return self.out_proj(self._gated_norm(y_BLI, z)), state

    @property
    def _group_rows(self) -> slice | None:
        """The rows of b and c that this rank uses; None for all that it holds."""
        return shared_rows(self.mesh, self._sharers, self.config.d_state)

    def _convolve(
        self,
        x_BLC: Tensor,
        projection: Linear,
        conv: WeightOf,
        documents: Tensor | None,
        before_BKD: Tensor | None,
        rows: slice | None = None,
    ) -> Tensor:
        """
        Args:
            before_BKD: the mixer's input at the last tokens of the shard before.
        """
        assert conv.bias is not None
        weight, bias = local(conv.weight), local(conv.bias)
        if rows is not None:
            weight, bias = weight[rows], bias[rows]
        halo = projection.forward(before_BKD, rows) if before_BKD is not None else None
        return causal_convolution(
            x_BLC, weight, bias, halo_BKC=halo, document_ids_BL=documents, activation="silu"
        )

    def _gated_norm(self, y_BLI: Tensor, z_BLI: Tensor) -> Tensor:
        """Over the groups; where ranks share one, they add up its sum of squares."""
        config, tp, weight = self.config, self.mesh.tp, local(self.norm.weight)
        if self._sharers == 1:
            groups = config.num_groups // tp.size
            return gated_rms_norm(y_BLI, z_BLI, weight, self.norm_eps, groups)
        group = tp.place // self._sharers
        layer = tp.layer

        def sum_over_sharers(squares_T1: Tensor) -> Tensor:
            by_group = squares_T1.new_zeros(len(squares_T1), config.num_groups)
            by_group[:, group] = squares_T1[:, 0]
            return sum_in_place(by_group, tp, layer)[:, group : group + 1]

        return gated_rms_norm_split(
            y_BLI,
            z_BLI,
            weight,
            self.norm_eps,
            width=config.d_inner // config.num_groups,
            sum_over_ranks=sum_over_sharers,
        )
