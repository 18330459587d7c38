"""Stages of a run: what of the config holds from which count of tokens on.

A stage says only what it changes; what one changed stays so until another changes it again.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from .config_section import Blend, Coefficient, Count, Rate, Schedule, Section, SequenceLength, Tokens

__all__ = ["STAGE_KEYS", "StageConfig", "stage_number", "tree_of_stage"]

UNSAID: Any = Field(default=None)
"""No value: the stage leaves the key as it is. `null` is one, where the key of the config may be null."""

WARMS_UP = {"schedule", "warmup_steps"}
"""Keys of `optim` by which a stage begins a schedule of its own."""


class Changes(Section):
    """Keys of a section of the config, of which only those that were said are written again."""

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = handler(self)
        return {name: tree[name] for name in type(self).model_fields if name in self.model_fields_set}


class StageData(Changes):
    blend: Blend = UNSAID
    seq_len: SequenceLength = UNSAID


class StageTrain(Changes):
    batch_size: Count = UNSAID
    micro_batch_size: Count | None = UNSAID


class StageOptim(Changes):
    """With ``schedule`` or ``warmup_steps`` the schedule begins anew at the stage's first step, without a
    warmup unless it says so, and lasts to ``train.steps``. Other keys leave the schedule where it is."""

    lr: Rate = UNSAID
    min_lr: Coefficient = UNSAID
    warmup_steps: Annotated[int, Field(ge=0)] = UNSAID
    schedule: Schedule = UNSAID
    decay_steps: Count | None = UNSAID


class StageConfig(Changes):
    """What holds from a count of tokens on."""

    from_tokens: Tokens
    """The stage begins with the first step that begins with so many tokens trained on; 4B or 4e9 will do."""
    data: StageData = StageData()
    train: StageTrain = StageTrain()
    optim: StageOptim = StageOptim()

    @property
    def begins_schedule(self) -> bool:
        """Whether its learning rate is that of a schedule of its own."""
        return bool(WARMS_UP & self.optim.model_fields_set)


STAGE_KEYS = [
    f"{section}.{key}"
    for section, keys in (("data", StageData), ("train", StageTrain), ("optim", StageOptim))
    for key in keys.model_fields
]
"""The keys of the config that a stage may change."""


def stage_number(stages: Any, tokens: int) -> int:
    """How many of the stages have begun.

    Args:
        stages: those of a config, or of its tree, in order.
        tokens: trained on.
    """
    begins = [stage["from_tokens"] if isinstance(stage, Mapping) else stage.from_tokens for stage in stages]
    return sum(begin <= tokens for begin in begins)


def tree_of_stage(tree: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A config's tree of keys as it holds once so many of its stages have begun; it has no stages itself.

    Args:
        tree: as :func:`dump_config` writes it.
    """
    stages = tree.get("stages", ())
    present = {key: value for key, value in tree.items() if key != "stages"}
    for stage in stages[:number]:
        for section in ("data", "train", "optim"):
            changed = dict(stage.get(section, {}))
            if WARMS_UP & changed.keys():
                changed.setdefault("warmup_steps", 0)
            present[section] = present[section] | changed
    return present
