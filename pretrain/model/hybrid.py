"""The model: an embedding, a pre-norm residual layer for each letter of the pattern, a norm, a head.

Shapes: B batch, L length, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.products import linear
from ...parallel.mesh import Mesh
from ...parallel.placements import local, place_parameters
from ...parallel.vocabulary import embed
from ..config import ModelConfig
from .attention import Attention
from .layers import Cache, Kept, Linear, Mixer, Packing, Report, RMSNorm
from .mamba2 import Mamba2
from .mlp import MLP
from .moe import MoE, Router
from .parameters import Normal, Rule, declare, declared_splits, initialize

__all__ = ["Hybrid", "Layer", "build_model"]

INITIAL_STD = 0.02
"""Of every matrix; Megatron-LM's recipe, with output projections divided by sqrt(layers)."""

EXACT_PARAMETERS = ("A_log", "D", "dt_bias", "router.weight")
"""Ends of the names of parameters that no cast may touch: at least fp32 in storage and in compute."""


class Layer(nn.Module):
    """``x + mixer(norm(x))``. In training the sum is left to the next layer, which makes it with its norm."""

    def __init__(self, mixer: Mixer, d_model: int, norm_eps: float, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.index = index

    def forward(
        self, x_BLD: Tensor, y_BLD: Tensor | None, packing: Packing, kept: Kept | None
    ) -> tuple[Tensor, Tensor, Report]:
        """
        Args:
            y_BLD: what is still to be added to x; None is nothing.

        Returns:
            The layer's input, and what it adds to it.
        """
        kept = kept or Kept(self.mixer.mesh)
        with self.mixer.mesh.layer(self.index):
            x_BLD, normed_BLD = self.norm.after(x_BLD, y_BLD)
            return x_BLD, *self.mixer(normed_BLD, packing, kept)

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Cache | None]:
        y_BLD, cache = self.mixer.prefill(self.norm(x_BLD), packing, capacity)
        return x_BLD + y_BLD, cache

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: Cache | None) -> Tensor:
        return x_B1D + self.mixer.step(self.norm(x_B1D), positions_B1, cache)


def _mamba(config: ModelConfig, std: float, out_std: float, mesh: Mesh) -> Mixer:
    assert config.mamba is not None
    return Mamba2(config.d_model, config.mamba, config.norm_eps, std, out_std, mesh)


def _attention(config: ModelConfig, std: float, out_std: float, mesh: Mesh) -> Mixer:
    assert config.attention is not None
    return Attention(config.d_model, config.attention, config.norm_eps, std, out_std, mesh)


def _mlp(config: ModelConfig, std: float, out_std: float, mesh: Mesh) -> Mixer:
    assert config.mlp is not None
    return MLP(config.d_model, config.mlp.d_ff, config.mlp.activation, std, out_std, mesh)


def _moe(config: ModelConfig, std: float, out_std: float, mesh: Mesh) -> Mixer:
    assert config.moe is not None
    return MoE(config.d_model, config.moe, std, out_std, mesh)


MIXERS: dict[str, Callable[[ModelConfig, float, float, Mesh], Mixer]] = {
    "M": _mamba,
    "*": _attention,
    "-": _mlp,
    "E": _moe,
}
"""The pattern's letters; a new mixer is one file, one letter in `pretrain/pattern.py`, one line here."""


class Embedding(nn.Module):
    """A row of D numbers for each token of the vocabulary."""

    def __init__(self, num_rows: int, d_model: int, rule: Rule, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.num_rows = mesh, num_rows
        self.weight = declare(self, "weight", (num_rows, d_model), rule, tp_dim=0)

    def forward(self, tokens_BL: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, L / tp, D), cut along the sequence over tp."""
        return embed(tokens_BL, local(self.weight), self.mesh, self.num_rows, dtype)


class Hybrid(nn.Module):
    """A hybrid language model; `forward` stops before the head, which the loss is fused with.

    On many ranks each holds its part of the parameters, and of the sequences that it is given.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh | None = None, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.mesh = mesh = mesh or Mesh.single()
        std, out_std = INITIAL_STD, INITIAL_STD / len(config.layers) ** 0.5
        self.embedding = Embedding(config.vocab_size, config.d_model, Normal(std), mesh)
        self.layers = nn.ModuleList(
            Layer(MIXERS[letter](config, std, out_std, mesh), config.d_model, config.norm_eps, index)
            for index, letter in enumerate(config.layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.d_model, config.vocab_size, Normal(std), tp_dim=0)
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): this rank's rows."""
        return local(self.embedding.weight if self.head is None else self.head.weight)

    @property
    def routers(self) -> list[Router]:
        """The routers, in the order of their layers."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self, tokens_BL: Tensor, packing: Packing, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Report]]:
        """Run the layers.

        Args:
            tokens_BL: ids, int64, of this rank's part of the sequences, the same on all ranks of tp.
            dtype: of the computation; None is that of the parameters.

        Returns:
            The final norm's output (B, L / tp, D), cut along the sequence over tp, and what each layer
            gave beside its output.
        """
        x, y = self.embedding(tokens_BL, dtype), None
        reports = []
        for layer in self.layers:
            # A compiler recomputes what it traced, and takes nothing from outside of it.
            kept = None if torch.compiler.is_compiling() else Kept(self.mesh)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # A layer that is computed again keeps its input: one tensor rather than two.
                x, y = x if y is None else x + y, None
                given = x, y, packing, kept
                x, y, report = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x, y, report = layer(x, y, packing, kept)
            reports.append(report)
        return self.final_norm.after(x, y)[1], reports

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
        x = self.embedding(tokens_BL, dtype)
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
        x = self.embedding(tokens_B[:, None], dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            assert isinstance(layer, Layer)
            x = layer.step(x, positions_B[:, None], cache)
        return self.final_norm(x[:, 0])

    def logits(self, hidden_D: Tensor) -> Tensor:
        """(…, D) -> (…, V), whole: for generation and comparison, not for training."""
        return linear(hidden_D, self.head_weight.to(hidden_D.dtype))


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mesh: Mesh | None = None,
    activation_checkpointing: bool = False,
    shard: Callable[["Hybrid"], None] | None = None,
) -> Hybrid:
    """A model on its device, with its parameters in `dtype` and initialised from `seed`.

    Args:
        shard: cuts the model further, while it takes no memory yet.
    """
    with torch.device("meta"):
        model = Hybrid(config, mesh, activation_checkpointing=activation_checkpointing)
    model = model.to(dtype)
    place_parameters(model, declared_splits(model), model.mesh)
    if shard is not None:
        shard(model)
    model = model.to_empty(device=device)
    for router in model.routers:
        router.correction_bias.zero_()
        router.counts.zero_()
    initialize(model, seed)
    return model
