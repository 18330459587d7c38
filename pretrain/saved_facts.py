"""What is read of a checkpoint's facts, held against what a training writes before anything follows."""

import itertools
import math
from typing import Any

import yaml

from ..data.plan import Plan
from ..errors import UserError
from .checkpoint import Checkpoint
from .yaml_text import read_yaml

__all__ = ["check_origin", "check_progress", "config_tree"]

LARGEST = 2**63
DTYPES = ("float32", "bfloat16", "float16")
"""That an import reads."""


def config_tree(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of the config that a checkpoint was saved with.

    Raises:
        UserError: it has none that plait could have written.
    """
    text = checkpoint.manifest.facts.get("config")
    try:
        tree = read_yaml(text) if isinstance(text, str) else None
    except yaml.YAMLError as error:
        raise _foreign(checkpoint, f"config is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise _foreign(checkpoint, "config holds no keys")
    return tree


def check_progress(checkpoint: Checkpoint) -> None:
    """Look whether a training can go on from the counters and the plan of the data.

    Raises:
        UserError: it cannot.
    """
    facts = checkpoint.manifest.facts
    for key in ("step", "samples", "tokens"):
        if not _is_count(facts.get(key)):
            raise _foreign(checkpoint, f"{key} = {repr(facts.get(key))[:40]} is no count")
    try:
        plan = Plan.from_json(facts["plan"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise _foreign(checkpoint, "plan is none of the data") from None
    first = [stage.first_sample for stage in plan.stages]
    if not first or not all(map(_is_count, first)) or first[0] != 0 or first != sorted(first):
        raise _foreign(checkpoint, "plan has no stages in their order")
    ends = [end for pair in plan.left_out for end in pair]
    if not all(map(_is_count, ends)) or any(a >= b for a, b in itertools.pairwise(ends)):
        raise _foreign(checkpoint, "plan leaves out samples that are none")
    schedule = facts.get("schedule", {"from_tokens": 0, "step": 0})
    if not isinstance(schedule, dict) or schedule.keys() != {"from_tokens", "step"}:
        raise _foreign(checkpoint, "schedule is none")
    if not all(map(_is_count, schedule.values())):
        raise _foreign(checkpoint, "schedule has no counts")
    for stage in plan.stages:
        sound = _is_count(stage.seq_len, 1) and _is_count(stage.segment_tokens, 1)
        sound = sound and type(stage.seed) is int and len(stage.sources) > 0
        for source in stage.sources:
            sound = sound and isinstance(source.prefix, str) and isinstance(source.content, str)
            sound = sound and all(map(_is_count, (source.tokens, source.epoch, source.token)))
            sound = sound and type(source.weight) in (int, float) and 0 < source.weight < math.inf
        if not sound:
            raise _foreign(checkpoint, f"plan has a stage from sample {stage.first_sample} on that is none")


def check_origin(checkpoint: Checkpoint) -> None:
    """Look whether what it says of an import, where it does, is of the form that an import writes.

    Raises:
        UserError: it is not.
    """
    origin = checkpoint.manifest.facts.get("origin", {})
    if not isinstance(origin, dict):
        raise _foreign(checkpoint, "origin is none")
    found = origin.get("huggingface")
    if found is None:
        return
    dtypes = found.get("dtypes") if isinstance(found, dict) else None
    if not (
        isinstance(dtypes, dict)
        and found.keys() == {"folder", "dtype", "config", "dtypes"}
        and isinstance(found["folder"], str)
        and isinstance(found["config"], dict)
        and all(kind in DTYPES for kind in (found["dtype"], *dtypes.values()) if isinstance(kind, str))
        and all(isinstance(kind, str) for kind in (found["dtype"], *dtypes.values()))
    ):
        raise _foreign(checkpoint, "origin is of no import")


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < LARGEST


def _foreign(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(f"{checkpoint.path}/manifest.json: its {what}; use another checkpoint")
