"""The attention mixer, ``*``: causal, with grouped queries, optional rotary positions and QK norm.

Shapes: B batch, L length, H query heads, K key heads, d head dim, D model width, S tokens that a cache
has room for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import attention_step, causal_attention
from ...parallel.attention import attend, send_keys
from ...parallel.collectives import all_gather, reduce_scatter
from ...parallel.mesh import Mesh
from ..config import AttentionConfig
from .layers import Cache, Kept, Linear, Mixer, Packing, Report, RMSNorm, exact, shared_rows
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
    """Tensor parallelism cuts its query heads, and its key heads while there are as many; ranks that share a
    key head each hold k and v whole and use that head's rows."""

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        norm_eps: float,
        std: float,
        out_std: float,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._sharers = max(1, mesh.tp.size // config.num_kv_heads)
        """Ranks of tp that have one key head between them."""
        key = 0 if self._sharers == 1 else None
        self.q_proj = Linear(d_model, queries, Normal(std), tp_dim=0)
        self.k_proj = Linear(d_model, keys, Normal(std), tp_dim=key)
        self.v_proj = Linear(d_model, keys, Normal(std), tp_dim=key)
        self.q_norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.o_proj = Linear(queries, d_model, Normal(out_std), tp_dim=1)

    def forward(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Report]:
        tp, positions = self.mesh.tp, packing.positions_BL
        x_BLD = all_gather(x_BLD, tp, dim=1)
        keys = send_keys(*self._keys(x_BLD, positions), self.mesh)
        # The queries are made while the keys travel.
        documents = {"document_ids_BS": packing.key_ids_BS, "most": packing.most}
        out = attend(self._queries(x_BLD, positions), keys, self.mesh, **documents)
        return reduce_scatter(self.o_proj(out.flatten(2)), tp, dim=1), Report()

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, AttentionCache]:
        q, (k, v) = self._queries(x_BLD, packing.positions_BL), self._keys(x_BLD, packing.positions_BL)
        out = causal_attention(q, k, v, document_ids_BS=packing.document_ids_BL, most=packing.most)
        mask = packing.last_document_BL
        cache = AttentionCache(
            _with_room(k, capacity),
            _with_room(v, capacity),
            x_BLD.shape[1],
            F.pad(mask, (0, capacity - x_BLD.shape[1]), value=True) if mask is not None else None,
        )
        return self.o_proj(out.flatten(2)), cache

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: AttentionCache) -> Tensor:
        q, (k, v) = self._queries(x_B1D, positions_B1), self._keys(x_B1D, positions_B1)
        place, cache.length = cache.length, cache.length + 1
        cache.k_BKSd[:, :, place], cache.v_BKSd[:, :, place] = k[:, 0], v[:, 0]
        held = slice(cache.length)
        mask = cache.mask_BS[:, held] if cache.mask_BS is not None else None
        out = attention_step(q[:, 0], cache.k_BKSd[:, :, held], cache.v_BKSd[:, :, held], mask)
        return self.o_proj(out.flatten(1))[:, None]

    def _queries(self, x_BLD: Tensor, positions_BL: Tensor) -> Tensor:
        """(B, L, H, d) of this rank's heads, as they meet keys."""
        q = self.q_proj(x_BLD).unflatten(-1, (-1, self.config.head_dim))
        q = q if self.q_norm is None else self.q_norm(q)
        theta = self.config.rope_theta
        return q if theta is None else rotate(q, positions_BL, theta)

    def _keys(self, x_BLD: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, as they meet queries, and values, (B, L, K, d) of this rank's heads."""
        heads = (-1, self.config.head_dim)
        k = self.k_proj(x_BLD, self._key_rows).unflatten(-1, heads)
        v = self.v_proj(x_BLD, self._key_rows).unflatten(-1, heads)
        k = k if self.k_norm is None else self.k_norm(k)
        theta = self.config.rope_theta
        return k if theta is None else rotate(k, positions_BL, theta), v

    @property
    def _key_rows(self) -> slice | None:
        """The rows of k and v that this rank uses; None for all that it holds."""
        return shared_rows(self.mesh, self._sharers, self.config.head_dim)


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
