"""What a training run is at a step, and how it comes back: everything a checkpoint holds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.plan import Plan
from ..errors import UserError, few
from .checkpoint import Checkpoint
from .config import Config
from .config_file import dump_config, flatten_config
from .model import Hybrid
from .saved_facts import check_progress, config_tree
from .stage_config import stage_number, tree_of_stage
from .yaml_text import read_yaml

__all__ = [
    "CARRIED",
    "FROM_THE_START",
    "ScheduleBegin",
    "TrainState",
    "changed_keys",
    "empty_carried",
    "word_differences",
]

logger = logging.getLogger(__name__)

FREE = (
    "run.dir",
    "train.steps",
    "train.stop_at",
    "train.time_limit",
    "train.micro_batch_size",
    "train.device",
    "train.activation_checkpointing",
    "parallel.",
    "checkpoint.",
    "log.",
    "evaluate.",
    "launch.",
    "data.validation",
    "data.workers",
)
"""Keys that a resumed run may change without a word."""

CARRIED = "carried."
"""Opens the names of tensors that a checkpoint only passes on."""


class ScheduleBegin(NamedTuple):
    from_tokens: int
    """By which the config's stage is known that it is of; 0 for that of the run's beginning."""
    step: int
    """Steps done before its first."""


FROM_THE_START = ScheduleBegin(0, 0)


@dataclass
class TrainState:
    model: Hybrid
    optimizer: torch.optim.AdamW
    plan: Plan
    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """The cursor into the plan: sequences consumed over all ranks, and left out."""
    tokens: int = 0
    """Tokens consumed over all ranks."""
    schedule: ScheduleBegin = FROM_THE_START
    """Where the learning rate's schedule began."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of an imported folder that no layer uses, on the CPU; kept for its export."""
    origin: dict[str, Any] | None = None
    """Where the weights began, if not from the seed; JSON."""

    def __post_init__(self) -> None:
        # AdamW makes its moments at its first step; a checkpoint is loaded into them before that.
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor: `model.*`, `optimizer.*` by the parameter's name, loads and random state."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"router.counts.{i}": router.counts for i, router in enumerate(self.model.routers)}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{kind}.{name}"] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        tensors |= {CARRIED + name: value for name, value in self.carried.items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def facts(self, config: Config) -> dict[str, Any]:
        """What JSON can hold of the state."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "schedule": self.schedule._asdict(),
            "config": dump_config(config),
            "plan": self.plan.to_json(),
            "plan_fingerprint": self.plan.fingerprint,
            **({"origin": self.origin} if self.origin else {}),
        }

    def resume(self, checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
        """Become what a checkpoint holds.

        Args:
            changes: what `changed_keys` found; each is announced.
        """
        self.carried = empty_carried(checkpoint)
        tensors = self.tensors()
        checkpoint.load_into(tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        facts = checkpoint.manifest.facts
        self.origin = facts.get("origin")
        self.step, self.samples, self.tokens = (int(facts[key]) for key in ("step", "samples", "tokens"))
        self.plan = Plan.from_json(facts["plan"])
        # Checkpoints of before there were stages do not say.
        self.schedule = ScheduleBegin(**facts.get("schedule", FROM_THE_START._asdict()))
        for key, (then, now) in changes.items():
            logger.warning("%s was %s in the checkpoint and is %s now", key, then, now)


def empty_carried(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors on the CPU to load what a checkpoint passes on into, by the names they had on arrival."""
    return {
        name.removeprefix(CARRIED): torch.empty(stored.shape, dtype=stored.dtype)
        for name, stored in checkpoint.tensors.items()
        if name.startswith(CARRIED)
    }


def changed_keys(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose value is not that of the checkpoint's config, as both hold at the checkpoint's tokens: key
    -> (then, now); and `stages`, where they differ.

    Keys that a resumed run may change freely are left out.

    Raises:
        UserError: facts that no training wrote, another model, which no checkpoint can be loaded into, or
            an imported one, which has nothing to go on with.
    """
    if "plan" not in checkpoint.manifest.facts:
        run = checkpoint.path.parent.parent
        raise UserError(
            f"run.dir = {run} is an imported model, and no training to go on with; set checkpoint.init_from "
            f"= {run} and another run.dir"
        )
    check_progress(checkpoint)
    tokens = checkpoint.manifest.facts["tokens"]
    try:
        then = _keys_at(config_tree(checkpoint), tokens)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{checkpoint.path}/manifest.json: its config is none; use another checkpoint"
        ) from None
    now = _keys_at(read_yaml(dump_config(config)), tokens)
    changed = {
        key: (then.get(key), now.get(key))
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(FREE)
    }
    fixed = [
        key for key in changed if key.startswith("model.") and not key.startswith("model.moe.score_bias_rate")
    ]
    if "train.dtype" in changed and "float64" in changed["train.dtype"]:
        fixed.append("train.dtype")
    if fixed:
        shown = word_differences({key: changed[key] for key in fixed}, "then", "now")
        raise UserError(
            f"{checkpoint.path}: saved with another model: {shown}; "
            "restore those keys, or choose another run.dir"
        )
    return changed


def _keys_at(tree: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    stages = tree.get("stages", [])
    return flatten_config(tree_of_stage(tree, stage_number(stages, tokens))) | {"stages": stages}


def word_differences(differ: Mapping[str, tuple[Any, Any]], one: str, other: str) -> str:
    """Keys and their two values for an error's line, the first four; `one` and `other` say whose they are."""
    return few([f"{key} = {a} {one} and {b} {other}" for key, (a, b) in differ.items()], most=4)
