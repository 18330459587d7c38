"""What a run is: every key of a config file, its type, its default and its meaning.

The classes are frozen and refuse unknown keys; a combination that cannot work dies here, with a
message that names the key and the remedy. `pretrain/config_file.py` reads them from YAML.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..parallel.axes import AXES, num_ranks
from .layout import check_layout
from .pattern import LETTERS, expand

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LogConfig",
    "MLPConfig",
    "MambaConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
]

Count = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Activation = Literal["squared_relu", "swiglu"]


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> Any:
    """Seconds, as a number or as in 11h50m."""
    if not isinstance(value, str) or not re.fullmatch(r"(\d+[dhms])+", value):
        return value
    return sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([dhms])", value))


Duration = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds)]


class Section(BaseModel):
    """A part of the config: frozen, keyword-only, strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    dir: Annotated[str, Field(min_length=1)]
    """The run's folder; it holds the config, metrics, logs and checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the initial parameters and the order of the data."""


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
                f"{self.num_heads}; choose one of {_divisors(self.num_heads)}"
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
                f"model.attention.num_heads = {self.num_heads}; choose one of {_divisors(self.num_heads)}"
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
                f"{self.num_experts}; choose one of {_divisors(self.num_experts)}"
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


class DataConfig(Section):
    blend: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """Shards to train on, ``PREFIX: weight``; PREFIX.bin and PREFIX.idx are in Megatron's format."""
    validation: str | None = None
    """The prefix of held-out shards, for evaluation."""
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens a training sequence; each sample holds one more, for the last target."""
    isolate_documents: bool = True
    """Documents that share a sequence do not see each other."""
    workers: Count = 1
    """Threads that read batches ahead, for disks that answer late; the order is the same for any number."""

    @field_validator("blend", mode="before")
    @classmethod
    def _one_source(cls, blend: Any) -> Any:
        return {blend: 1.0} if isinstance(blend, str) else blend

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.blend:
            raise ValueError("data.blend = {} names no shards; add PREFIX: weight")
        return self


class TrainConfig(Section):
    steps: Count
    """Optimizer steps of the whole schedule."""
    stop_at: Count | None = None
    """End at this step, with a checkpoint, as if interrupted: the schedule stays that of ``steps``."""
    time_limit: Duration | None = None
    """Stop, with a checkpoint, after the step during which this time has passed since the command's start:
    seconds, or as in 11h50m. Leave room for a step and a save before whoever set the limit loses patience."""
    batch_size: Count
    """Sequences a step, over all ranks."""
    micro_batch_size: Count | None = None
    """Sequences a forward pass on a rank, at most; null means the rank's whole share of the batch."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Of the computation; parameters are kept in fp32 (float64 under float64)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation_checkpointing: bool = False
    """Keep only each layer's input and recompute the layer in the backward."""
    z_loss: Coefficient = 0.0
    """Coefficient of the squared log-sum-exp of the vocabulary's logits, per token."""


class OptimConfig(Section):
    """AdamW; parameters with one dimension do not decay."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The peak learning rate."""
    min_lr: Coefficient = 0.0
    """Where the decay ends."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear from zero to the peak."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warmup: hold then decay linearly (wsd), half a cosine, or hold."""
    decay_steps: Count | None = None
    """Length of wsd's decay; null means a fifth of ``train.steps``."""
    weight_decay: Coefficient = 0.1
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """Largest global norm of the gradient; null means no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr} exceeds optim.lr = {self.lr}; lower it")
        return self


class ParallelConfig(Section):
    """Ranks an axis; a run is started on as many ranks as their product. The numbers do not depend on it."""

    dp_replicate: Count = 1
    """Copies of the sharded model, each with other sequences (HSDP)."""
    dp_shard: Count = 1
    """Ranks with other sequences that hold the parameters' shards between them (FSDP)."""
    sp: Count = 1
    """Ranks that a sequence is cut over; they hold parameters' shards too."""
    tp: Count = 1
    """Ranks that heads, channels and the vocabulary are cut over; best within a machine."""
    ep: Count = 1
    """Ranks that the experts are divided over, folded out of dp_shard x sp x tp: it adds none."""
    state_exchange: Literal["auto", "ring", "gather", "scan"] = "auto"
    """How SSM states travel over sp; auto is ring for 2 ranks, gather to 16, scan beyond."""
    fold_queries: bool = True
    """Ranks of sp trade queries, so that causal attention is the same work for all."""
    keep_dispatched: bool = False
    """Under train.activation_checkpointing, keep the tokens that experts' ranks sent each other, rather than
    send them again for the backward."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without progress after which a run prints every rank's stacks and ends."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> ranks, `ep` among them."""
        return {axis: getattr(self, axis) for axis in (*AXES, "ep")}

    @property
    def ranks(self) -> int:
        """Ranks of the layout."""
        return num_ranks(self.sizes)


class CheckpointConfig(Section):
    every: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 3
    """How many of the newest checkpoints stay on disk."""
    keep_every: Count | None = None
    """Checkpoints at multiples of so many steps stay for ever, beside the newest; null means none do."""
    async_: Annotated[bool, Field(alias="async")] = True
    """Write in the background while training goes on."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """A run, or RUN@STEP, whose weights this one begins with: model and routers' biases, with a fresh
    optimizer, schedule and order of data. What the config leaves out of ``model`` is that run's. Without
    effect once this run has a checkpoint of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            nearest = max(1, round(self.keep_every / self.every)) * self.every
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} is no multiple of checkpoint.every = "
                f"{self.every}, so that few of its steps are saved; set it to {nearest}"
            )
        return self


class LogConfig(Section):
    every: Count = 10
    """Steps between lines of the log; metrics.jsonl has every step."""
    tensorboard: bool = True


class EvaluateConfig(Section):
    every: Count = 500
    """Steps between evaluations on ``data.validation``; the last step is always evaluated."""
    batches: Count = 16
    """Batches of ``train.batch_size`` sequences an evaluation reads."""


class Config(Section):
    """A run: what `plait train` reads."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        train, optim = self.train, self.optim
        check_layout(self.model, self.parallel.sizes, seq_len=self.data.seq_len, batch_size=train.batch_size)
        if optim.warmup_steps > train.steps:
            raise ValueError(
                f"optim.warmup_steps = {optim.warmup_steps} exceeds train.steps = {train.steps}; lower it"
            )
        if optim.decay_steps is not None and optim.warmup_steps + optim.decay_steps > train.steps:
            raise ValueError(
                f"optim.decay_steps = {optim.decay_steps} and optim.warmup_steps = {optim.warmup_steps} "
                f"together exceed train.steps = {train.steps}; lower one"
            )
        return self


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
