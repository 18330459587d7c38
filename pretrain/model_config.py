"""What a model is: the sections under `model` of a config file."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .config_section import Coefficient, Count, Section, divisors
from .pattern import LETTERS, expand

__all__ = ["Activation", "AttentionConfig", "MLPConfig", "MambaConfig", "MoEConfig", "ModelConfig"]

Activation = Literal["squared_relu", "swiglu"]


class MambaConfig(Section):
    """Shape of the ``M`` layers (Mamba-2, arXiv 2405.21060)."""

    num_heads: Count
    """H, the SSM heads; the inner width is ``num_heads * head_dim``."""
    head_dim: Count = 64
    """P, the channels of a head."""
    d_state: Count = 128
    """N, the state size of a channel."""
    num_groups: Count = 1
    """G, the groups that share B and C; also the groups of the gated norm."""
    d_conv: Annotated[int, Field(ge=2, le=8)] = 4
    """The taps of the causal depthwise convolution."""
    chunk_size: Count = 64
    """Q, tokens a chunk of the scan: a matter of speed, never of results beyond rounding."""
    dt_limit: Annotated[tuple[float, float], Field(strict=False)] = (0.0, math.inf)
    """The step sizes are clamped to this range after the softplus."""

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"model.mamba.num_groups = {self.num_groups} does not divide model.mamba.num_heads = "
                f"{self.num_heads}; choose one of {divisors(self.num_heads)}"
            )
        low, high = self.dt_limit
        if math.isnan(low) or math.isnan(high) or not 0 <= low < high:
            raise ValueError(f"model.mamba.dt_limit = [{low}, {high}] needs 0 <= low < high")
        return self


class AttentionConfig(Section):
    """Shape of the ``*`` layers: causal attention with grouped queries."""

    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """Key and value heads; each serves ``num_heads / num_kv_heads`` query heads."""
    head_dim: Count = 128
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Base of the rotary position encoding; null means no positional encoding."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the scores."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.attention.num_kv_heads = {self.num_kv_heads} does not divide "
                f"model.attention.num_heads = {self.num_heads}; choose one of {divisors(self.num_heads)}"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"model.attention.head_dim = {self.head_dim} is odd, and rotary encoding turns pairs; "
                "make it even or set model.attention.rope_theta = null"
            )
        return self


class MLPConfig(Section):
    """Shape of the ``-`` layers."""

    d_ff: Count
    activation: Activation = "squared_relu"
    """``swiglu`` has a gate projection beside the up projection, ``squared_relu`` has none."""


class MoEConfig(Section):
    """Shape of the ``E`` layers: routed experts, dropless, with an optional shared expert."""

    num_experts: Count
    top_k: Count
    """Experts a token is sent to."""
    d_expert: Count
    """Hidden width of a routed expert."""
    d_shared: Annotated[int, Field(ge=0)] = 0
    """Hidden width of the expert that sees every token; 0 means none."""
    activation: Activation = "squared_relu"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns the router's logits into scores."""
    num_groups: Count = 1
    """Groups of neighbouring experts, of which a token's are chosen first; 1 means none."""
    top_k_groups: Count = 1
    """Groups that a token's experts may come from."""
    score_bias: bool = True
    """Balance by a bias that takes part in the choice of experts only (arXiv 2408.15664)."""
    score_bias_rate: Coefficient = 1e-3
    """How far that bias moves at each step, towards the experts that got too few tokens."""
    norm_top_k: bool = True
    """Divide the chosen scores by their sum."""
    scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on the routed experts' output."""
    latent_dim: Count | None = None
    """Width the routed experts work in, projected down to and up from; null means d_model."""
    aux_loss: Coefficient = 0.0
    """Coefficient of the load-balancing loss, taken per sequence."""
    z_loss: Coefficient = 0.0
    """Coefficient of the squared log-sum-exp of the router's logits, per token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k = {self.top_k} exceeds model.moe.num_experts = {self.num_experts}; "
                f"choose at most {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.moe.num_groups = {self.num_groups} does not divide model.moe.num_experts = "
                f"{self.num_experts}; choose one of {divisors(self.num_experts)}"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"model.moe.top_k_groups = {self.top_k_groups} exceeds model.moe.num_groups = "
                f"{self.num_groups}; choose at most {self.num_groups}"
            )
        reachable = self.num_experts // self.num_groups * self.top_k_groups
        if self.top_k > reachable:
            raise ValueError(
                f"model.moe.top_k = {self.top_k} exceeds what can be chosen, {reachable}, with "
                f"model.moe.top_k_groups = {self.top_k_groups} of {self.num_groups} groups; "
                "raise top_k_groups or lower top_k"
            )
        return self


class ModelConfig(Section):
    pattern: str
    """One letter a layer: M Mamba-2, * attention, - MLP, E experts; ``[...]xN`` repeats."""
    d_model: Count
    vocab_size: Count
    """Rows of the embedding and the head; at least the tokenizer's."""
    tie_embeddings: bool = False
    """The head shares the embedding's matrix."""
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    mamba: MambaConfig | None = None
    attention: AttentionConfig | None = None
    mlp: MLPConfig | None = None
    moe: MoEConfig | None = None

    @property
    def layers(self) -> str:
        """The pattern without brackets, one letter a layer."""
        return expand(self.pattern)

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, pattern: str) -> str:
        try:
            expand(pattern)
        except ValueError as error:
            raise ValueError(f"model.pattern = {pattern!r}: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _check(self) -> Self:
        for letter in dict.fromkeys(self.layers):
            if getattr(self, LETTERS[letter]) is None:
                raise ValueError(
                    f"model.pattern = {self.pattern!r} has the letter '{letter}' but model."
                    f"{LETTERS[letter]} is not set; add that section or drop the letter"
                )
        return self
