"""What a run is: every key of a config file, its type, its default and its meaning.

The classes are frozen and refuse unknown keys; a combination that cannot work dies here, with a
message that names the key and the remedy. `model_config.py` has the sections of the model, and
`config_file.py` reads all of them from YAML.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..parallel.axes import LAYOUT, num_ranks
from .config_section import Blend, Coefficient, Count, Duration, Rate, Schedule, Section, SequenceLength
from .layout import check_layout
from .model_config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig
from .stage_config import StageConfig, stage_number, tree_of_stage

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


Sample = Annotated[int, Field(ge=0)]
SampleRange = Annotated[tuple[Sample, Sample], Field(strict=False)]


class DataConfig(Section):
    blend: Blend
    """Shards to train on, ``PREFIX: weight``; PREFIX.bin and PREFIX.idx are in Megatron's format."""
    validation: str | None = None
    """The prefix of held-out shards, for evaluation."""
    seq_len: SequenceLength
    """Tokens a training sequence; each sample holds one more, for the last target."""
    isolate_documents: bool = True
    """Documents that share a sequence do not see each other."""
    workers: Count = 1
    """Threads that read batches ahead, for disks that answer late; the order is the same for any number."""
    skip: Annotated[tuple[SampleRange, ...], Field(strict=False)] = ()
    """Samples that are left out, as ``[[from, to], …]``, `to` not among them: those that metrics.jsonl counts
    as `samples`. What would have come after them comes in their place."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        reached = 0
        for begin, end in self.skip:
            if begin < reached or end <= begin:
                raise ValueError(
                    f"data.skip has [{begin}, {end}] after {reached}; give pairs [from, to] in order, none "
                    "empty"
                )
            reached = end
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
    kernel_cache: Annotated[str, Field(min_length=1)] | None = None
    """Where compiled Triton kernels are kept, best on each machine's own disk; null means what
    TRITON_CACHE_DIR says, and else a folder of the user's under TMPDIR or /tmp."""


class OptimConfig(Section):
    """AdamW; parameters with one dimension do not decay."""

    lr: Rate
    """The peak learning rate."""
    min_lr: Coefficient = 0.0
    """Where the decay ends."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear from zero to the peak."""
    schedule: Schedule = "wsd"
    """After the warmup: hold then decay linearly (wsd), half a cosine, or hold."""
    decay_steps: Count | None = None
    """Length of wsd's decay; null means a fifth of ``train.steps``."""
    weight_decay: Coefficient = 0.1
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    clip: Rate | None = 1.0
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
    grow_vocabulary: bool = False
    """With ``init_from``, let ``model.vocab_size`` be larger than there, and the corpus's tokenizer have more
    ids, the first of which mean the same. Rows beyond those saved come from the seed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            nearest = max(1, round(self.keep_every / self.every)) * self.every
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} is no multiple of checkpoint.every = "
                f"{self.every}, so that few of its steps are saved; set it to {nearest}"
            )
        if self.grow_vocabulary and self.init_from is None:
            raise ValueError(
                "checkpoint.grow_vocabulary = true without checkpoint.init_from has nothing that grows; "
                "name the run to begin from, or leave it out"
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
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = ()
    """What changes on the way, each from a count of tokens on: ``data.blend``, ``data.seq_len``,
    ``train.batch_size``, the schedule under ``optim``."""

    def at(self, tokens: int) -> "Config":
        """The config as it holds after so many tokens: without stages, what they changed in its place."""
        return self._of_stage(stage_number(self.stages, tokens))

    def each_stage(self) -> "list[Config]":
        """The config as it holds in its beginning and from each stage on."""
        return [self._of_stage(number) for number in range(len(self.stages) + 1)]

    def shards(self, tokens: int | None = None) -> list[str]:
        """The prefixes that it trains on, up to so many tokens or in all stages."""
        stages = self.each_stage()
        begun = stages if tokens is None else stages[: 1 + stage_number(self.stages, tokens)]
        return list(dict.fromkeys(prefix for stage in begun for prefix in stage.data.blend))

    def _of_stage(self, number: int) -> "Config":
        return Config.model_validate(tree_of_stage(self.model_dump(mode="json", by_alias=True), number))

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

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        before = 0
        for index, stage in enumerate(self.stages):
            if stage.from_tokens <= before:
                raise ValueError(
                    f"stages.{index}.from_tokens = {stage.from_tokens} does not come after {before}; give "
                    "the stages in their order"
                )
            before = stage.from_tokens
            try:
                self._of_stage(index + 1)
            except ValidationError as error:
                detail = error.errors(include_url=False)[0]
                cause = detail.get("ctx", {}).get("error", detail["msg"])
                raise ValueError(f"stages.{index}: {cause}") from None
        return self
