"""The model: an embedding, a pre-norm residual layer for each letter of the pattern, a norm, a head.

Shapes: B batch, L length, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from .attention import Attention
from .layers import Cache, Linear, Mixer, MixerOutput, Packing, RMSNorm, WeightOf
from .mamba2 import Mamba2
from .mlp import MLP
from .moe import MoE, Router
from .parameters import Normal, initialize

__all__ = ["Hybrid", "Layer", "build_model"]

INITIAL_STD = 0.02
"""Of every matrix; Megatron-LM's recipe, with output projections divided by sqrt(layers)."""

EXACT_PARAMETERS = ("A_log", "D", "dt_bias", "router.weight")
"""Ends of the names of parameters that no cast may touch: at least fp32 in storage and in compute."""


class Layer(nn.Module):
    """``x + mixer(norm(x))``."""

    def __init__(self, mixer: Mixer, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer

    def forward(self, x_BLD: Tensor, packing: Packing) -> MixerOutput:
        output = self.mixer(self.norm(x_BLD), packing)
        output.y_BLD = x_BLD + output.y_BLD
        return output

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Cache | None]:
        y_BLD, cache = self.mixer.prefill(self.norm(x_BLD), packing, capacity)
        return x_BLD + y_BLD, cache

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: Cache | None) -> Tensor:
        return x_B1D + self.mixer.step(self.norm(x_B1D), positions_B1, cache)


def _mamba(config: ModelConfig, std: float, out_std: float) -> Mixer:
    assert config.mamba is not None
    return Mamba2(config.d_model, config.mamba, config.norm_eps, std, out_std)


def _attention(config: ModelConfig, std: float, out_std: float) -> Mixer:
    assert config.attention is not None
    return Attention(config.d_model, config.attention, config.norm_eps, std, out_std)


def _mlp(config: ModelConfig, std: float, out_std: float) -> Mixer:
    assert config.mlp is not None
    return MLP(config.d_model, config.mlp.d_ff, config.mlp.activation, std, out_std)


def _moe(config: ModelConfig, std: float, out_std: float) -> Mixer:
    assert config.moe is not None
    return MoE(config.d_model, config.moe, std, out_std)


MIXERS: dict[str, Callable[[ModelConfig, float, float], Mixer]] = {
    "M": _mamba,
    "*": _attention,
    "-": _mlp,
    "E": _moe,
}
"""The pattern's letters; a new mixer is one file, one letter in `pretrain/pattern.py`, one line here."""


class Hybrid(nn.Module):
    """A hybrid language model; `forward` stops before the head, which the loss is fused with."""

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        out_std = INITIAL_STD / len(config.layers) ** 0.5
        self.embedding = WeightOf((config.vocab_size, config.d_model), Normal(INITIAL_STD))
        self.layers = nn.ModuleList(
            Layer(MIXERS[letter](config, INITIAL_STD, out_std), config.d_model, config.norm_eps)
            for letter in config.layers
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, Normal(INITIAL_STD))
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def routers(self) -> list[Router]:
        """The routers, in the order of their layers."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self, tokens_BL: Tensor, packing: Packing, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[MixerOutput]]:
        """Run the layers.

        Args:
            tokens_BL: ids, int64.
            dtype: of the computation; None is that of the parameters.

        Returns:
            The final norm's output (B, L, D), and what each layer gave beside its output, whose
            y is dropped.
        """
        x = F.embedding(tokens_BL, self.embedding.weight)
        x = x if dtype is None else x.to(dtype)
        outputs = []
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                output = checkpoint(layer, x, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                output = layer(x, packing)
            assert isinstance(output, MixerOutput)
            x = output.y_BLD
            output.y_BLD = x.new_empty(0)
            outputs.append(output)
        return self.final_norm(x), outputs

    @torch.no_grad()
    def prefill(
        self, tokens_BL: Tensor, packing: Packing, capacity: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Cache | None]]:
        """Run the layers over prompts, to go on from the last document of each row.

        Args:
            capacity: tokens that a row will hold at most, those of the prompt included.

        Returns:
            The final norm's output at the last token (B, D), and each layer's cache for `step`.
        """
        x = F.embedding(tokens_BL, self.embedding.weight)
        x = x if dtype is None else x.to(dtype)
        caches = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x, cache = layer.prefill(x, packing, capacity)
            caches.append(cache)
        return self.final_norm(x[:, -1]), caches

    @torch.no_grad()
    def step(
        self,
        tokens_B: Tensor,
        positions_B: Tensor,
        caches: list[Cache | None],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Run the layers over one token more a row; the caches move on in place.

        Args:
            positions_B: each token's place in its document.

        Returns:
            The final norm's output (B, D).
        """
        x = F.embedding(tokens_B[:, None], self.embedding.weight)
        x = x if dtype is None else x.to(dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            assert isinstance(layer, Layer)
            x = layer.step(x, positions_B[:, None], cache)
        return self.final_norm(x[:, 0])

    def logits(self, hidden_D: Tensor) -> Tensor:
        """(…, D) -> (…, V), whole: for generation and comparison, not for training."""
        return F.linear(hidden_D, self.head_weight.to(hidden_D.dtype))


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool = False,
) -> Hybrid:
    """A model on its device, with its parameters in `dtype` and initialised from `seed`."""
    with torch.device("meta"):
        model = Hybrid(config, activation_checkpointing=activation_checkpointing)
    model = model.to(dtype).to_empty(device=device)
    for router in model.routers:
        router.correction_bias.zero_()
        router.counts.zero_()
    initialize(model, seed)
    return model
