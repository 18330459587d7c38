"""The Mamba-2 mixer, ``M`` (arXiv 2405.21060), with one matrix a role.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width, K taps of the
convolution, C its channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ssd
from ...kernels.convolution import causal_convolution, convolution_step
from ...kernels.normalization import gated_rms_norm
from ..config import MambaConfig
from .layers import Cache, Linear, Mixer, MixerOutput, Packing, WeightOf, exact
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
    def __init__(
        self, d_model: int, config: MambaConfig, norm_eps: float, std: float, out_std: float
    ) -> None:
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        inner, shared = config.d_inner, config.num_groups * config.d_state
        self.z_proj = Linear(d_model, inner, Normal(std))
        self.x_proj = Linear(d_model, inner, Normal(std))
        self.b_proj = Linear(d_model, shared, Normal(std))
        self.c_proj = Linear(d_model, shared, Normal(std))
        self.dt_proj = Linear(d_model, config.num_heads, Normal(std))
        # As a convolution of d_conv taps on one channel starts by default: within 1/sqrt(fan-in).
        taps = Uniform(config.d_conv**-0.5)
        self.x_conv = WeightOf((inner, config.d_conv), taps, bias=taps)
        self.b_conv = WeightOf((shared, config.d_conv), taps, bias=taps)
        self.c_conv = WeightOf((shared, config.d_conv), taps, bias=taps)
        self.A_log = declare(self, "A_log", (config.num_heads,), LogUniformA())
        self.D = declare(self, "D", (config.num_heads,), Constant(1.0))
        self.dt_bias = declare(self, "dt_bias", (config.num_heads,), LogUniformStep())
        self.norm = WeightOf((inner,), Constant(1.0))
        self.out_proj = Linear(inner, d_model, Normal(out_std))

    def forward(self, x_BLD: Tensor, packing: Packing) -> MixerOutput:
        y_BLD, state = self._scan(x_BLD, packing.document_ids_BL)
        return MixerOutput(y_BLD, state_norm=state.detach().square().mean().sqrt())

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Mamba2Cache]:
        y_BLD, state = self._scan(x_BLD, packing.document_ids_BL)
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

    def _scan(self, x_BLD: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mixer's output and the states (B, H, P, N) after the last token."""
        config = self.config
        heads = (config.num_heads, config.head_dim)
        groups = (config.num_groups, config.d_state)
        # Step sizes decide decays, so their product with x is not rounded to bf16.
        dt_BLH = F.linear(exact(x_BLD), exact(self.dt_proj.weight))
        scan = ssd.begin(
            self._convolve(self.x_proj(x_BLD), self.x_conv, documents).unflatten(-1, heads),
            dt_BLH,
            -torch.exp(exact(self.A_log)),
            self._convolve(self.b_proj(x_BLD), self.b_conv, documents).unflatten(-1, groups),
            dt_bias_H=self.dt_bias,
            dt_limit=config.dt_limit,
            document_ids_BL=documents,
            chunk_size=config.chunk_size,
        )
        # Between begin and finish stands work that needs no state: it hides the exchange of states.
        z = self.z_proj(x_BLD)
        C_BLGN = self._convolve(self.c_proj(x_BLD), self.c_conv, documents).unflatten(-1, groups)
        y_BLHP, state = ssd.finish(scan, C_BLGN, D_H=self.D)
        y = gated_rms_norm(y_BLHP.flatten(2), z, self.norm.weight, self.norm_eps, config.num_groups)
        return self.out_proj(y), state

    def _convolve(self, x_BLC: Tensor, conv: WeightOf, documents: Tensor | None) -> Tensor:
        return causal_convolution(x_BLC, conv.weight, conv.bias, document_ids_BL=documents, activation="silu")
