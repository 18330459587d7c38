"""Sizes of a layer of experts, and the layer itself from plait.

Shapes: T tokens of a rank, D model width, E experts, K experts a token, F hidden width of an expert, W the
width that experts work in.
"""

from dataclasses import dataclass

import torch

from plait.parallel.mesh import Mesh
from plait.pretrain.config import ModelConfig, MoEConfig
from plait.pretrain.model import build_model
from plait.pretrain.model.moe import MoE

__all__ = ["Shape"]


@dataclass(frozen=True)
class Shape:
    d_model: int
    num_experts: int
    top_k: int
    d_expert: int
    d_shared: int = 0
    latent_dim: int | None = None

    @property
    def width(self) -> int:
        return self.latent_dim or self.d_model

    @property
    def dense(self) -> int:
        """Hidden width of an MLP with the products that a token's experts take, the router's left out."""
        routed = self.top_k * self.d_expert * self.width // self.d_model
        return routed + self.d_shared + (self.latent_dim or 0)

    def layer(self, mesh: Mesh | None = None) -> MoE:
        """In fp32; each rank of ep has its experts."""
        config = ModelConfig(
            pattern="E",
            d_model=self.d_model,
            vocab_size=8,
            moe=MoEConfig(
                num_experts=self.num_experts,
                top_k=self.top_k,
                d_expert=self.d_expert,
                d_shared=self.d_shared,
                latent_dim=self.latent_dim,
            ),
        )
        mixer = build_model(config, seed=0, dtype=torch.float32, mesh=mesh).layers[0].mixer
        assert isinstance(mixer, MoE)
        return mixer

    def __str__(self) -> str:
        words = f"D {self.d_model}, E {self.num_experts}, K {self.top_k}, F {self.d_expert}"
        words += f", shared {self.d_shared}" if self.d_shared else ""
        return words + (f", W {self.latent_dim}" if self.latent_dim else "")
