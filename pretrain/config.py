"""What a run is: every key of a config file, its type, its default and its meaning.

The classes are frozen and refuse unknown keys; a combination that cannot work dies here, with a
message that names the key and the remedy. `model_config.py` has the sections of the model, and
`config_file.py` reads all of them from YAML.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..parallel.axes import LAYOUT, num_ranks
from .config_section import Coefficient, Count, Duration, Section
from .layout import check_layout
from .model_config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LaunchConfig",
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


class RunConfig(Section):
    dir: Annotated[str, Field(min_length=1)]
    """The run's folder; it holds the config, metrics, logs and checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the initial parameters and the order of the data."""


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
        return {axis: getattr(self, axis) for axis in LAYOUT}

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


class LaunchConfig(Section):
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row a run whose ranks died is started again without a newer checkpoint; one that comes
    gives all of them back."""


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
    launch: LaunchConfig = LaunchConfig()

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
