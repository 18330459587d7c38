"""The Mamba-2 mixer, ``M`` (arXiv 2405.21060), with one matrix a role.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ssd
from ...kernels.convolution import causal_convolution
from ...kernels.normalization import gated_rms_norm
from ..config import MambaConfig
from .layers import Linear, Mixer, MixerOutput, Packing, WeightOf, exact
from .parameters import Constant, LogUniformA, LogUniformStep, Normal, Uniform, declare

__all__ = ["Mamba2"]


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
        config, documents = self.config, packing.document_ids_BL
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
        return MixerOutput(self.out_proj(y), state_norm=state.detach().square().mean().sqrt())

    def _convolve(self, x_BLC: Tensor, conv: WeightOf, documents: Tensor | None) -> Tensor:
        return causal_convolution(x_BLC, conv.weight, conv.bias, document_ids_BL=documents, activation="silu")
