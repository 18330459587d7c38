"""The attention mixer, ``*``: causal, with grouped queries, optional rotary positions and QK norm.

Shapes: B batch, L length, H query heads, K key heads, d head dim, D model width.
"""

import torch
from torch import Tensor

from ...kernels.attention import causal_attention
from ..config import AttentionConfig
from .layers import Linear, Mixer, MixerOutput, Packing, RMSNorm, exact
from .parameters import Normal

__all__ = ["Attention", "rotate"]


class Attention(Mixer):
    def __init__(
        self, d_model: int, config: AttentionConfig, norm_eps: float, std: float, out_std: float
    ) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(d_model, queries, Normal(std))
        self.k_proj = Linear(d_model, keys, Normal(std))
        self.v_proj = Linear(d_model, keys, Normal(std))
        self.q_norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.o_proj = Linear(queries, d_model, Normal(out_std))

    def forward(self, x_BLD: Tensor, packing: Packing) -> MixerOutput:
        config = self.config
        q = self.q_proj(x_BLD).unflatten(-1, (config.num_heads, config.head_dim))
        k = self.k_proj(x_BLD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = self.v_proj(x_BLD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope_theta is not None:
            q = rotate(q, packing.positions_BL, config.rope_theta)
            k = rotate(k, packing.positions_BL, config.rope_theta)
        out = causal_attention(q, k, v, document_ids_BL=packing.document_ids_BL)
        return MixerOutput(self.o_proj(out.flatten(2)))


def rotate(x_BLHd: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """Rotary position encoding (arXiv 2104.09864): turn the pair (i, i + d/2) by ``p theta^(-2i/d)``."""
    half = x_BLHd.shape[-1] // 2
    acc = exact(x_BLHd)
    exponents = torch.arange(half, device=acc.device, dtype=acc.dtype) / half
    angles = positions_BL[..., None, None].to(acc.dtype) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    first, second = acc[..., :half], acc[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BLHd.dtype)
