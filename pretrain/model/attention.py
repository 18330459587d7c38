"""The attention mixer, ``*``: causal, with grouped queries, optional rotary positions and QK norm.

Shapes: B batch, L length, H query heads, K key heads, d head dim, D model width, S tokens that a cache
has room for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import attention_step, causal_attention
from ..config import AttentionConfig
from .layers import Cache, Linear, Mixer, MixerOutput, Packing, RMSNorm, exact
from .parameters import Normal

__all__ = ["Attention", "rotate"]


@dataclass
class AttentionCache(Cache):
    k_BKSd: Tensor
    v_BKSd: Tensor
    length: int
    """Tokens held; what lies after them is unset."""
    mask_BS: Tensor | None
    """False at tokens that were of another document; None where there are none."""


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
        q, k, v = self._project(x_BLD, packing.positions_BL)
        out = causal_attention(q, k, v, document_ids_BL=packing.document_ids_BL)
        return MixerOutput(self.o_proj(out.flatten(2)))

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, AttentionCache]:
        q, k, v = self._project(x_BLD, packing.positions_BL)
        out = causal_attention(q, k, v, document_ids_BL=packing.document_ids_BL)
        mask = packing.last_document_BL
        cache = AttentionCache(
            _with_room(k, capacity),
            _with_room(v, capacity),
            x_BLD.shape[1],
            F.pad(mask, (0, capacity - x_BLD.shape[1]), value=True) if mask is not None else None,
        )
        return self.o_proj(out.flatten(2)), cache

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: AttentionCache) -> Tensor:
        q, k, v = self._project(x_B1D, positions_B1)
        place, cache.length = cache.length, cache.length + 1
        cache.k_BKSd[:, :, place], cache.v_BKSd[:, :, place] = k[:, 0], v[:, 0]
        held = slice(cache.length)
        mask = cache.mask_BS[:, held] if cache.mask_BS is not None else None
        out = attention_step(q[:, 0], cache.k_BKSd[:, :, held], cache.v_BKSd[:, :, held], mask)
        return self.o_proj(out.flatten(1))[:, None]

    def _project(self, x_BLD: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, d), keys and values (B, L, K, d), as they meet."""
        config = self.config
        q = self.q_proj(x_BLD).unflatten(-1, (config.num_heads, config.head_dim))
        k = self.k_proj(x_BLD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = self.v_proj(x_BLD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope_theta is not None:
            q = rotate(q, positions_BL, config.rope_theta)
            k = rotate(k, positions_BL, config.rope_theta)
        return q, k, v


def _with_room(tensor_BLKd: Tensor, capacity: int) -> Tensor:
    """(B, K, S, d), the tokens first."""
    batch, length, heads, head_dim = tensor_BLKd.shape
    room = tensor_BLKd.new_empty(batch, heads, capacity, head_dim)
    room[:, :, :length] = tensor_BLKd.transpose(1, 2)
    return room


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
