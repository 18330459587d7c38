"""A run that branches off another: its checkpoint, its past, and a config of its own."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.atomic_folder import appearing_at_once
from ..data.plan import Plan
from ..errors import UserError
from .checkpoint.copying import copy_checkpoint
from .config import Config
from .config_file import differing_keys, dump_config, override_config, parse_config
from .metrics_file import read_metrics
from .named_checkpoints import find_intact
from .run_folder import RunFolder
from .run_log import note
from .saved_facts import config_tree
from .train_state import changed_keys

__all__ = ["Fork", "fork_run"]

OWN_KEYS = {"train": {"stop_at": None}, "checkpoint": {"init_from": None}}
"""What the new run does not take over: where the old one was to stop, and what it began from."""


@dataclass(frozen=True)
class Fork:
    folder: RunFolder
    step: int
    """Where it branches off."""
    config: Config
    changes: dict[str, tuple[Any, Any]]
    """Keys of its config that are not the parent's: key -> (the parent's, its own)."""


def fork_run(reference: str, target: str | Path, overrides: Iterable[str] = ()) -> Fork:
    """Make a run that goes on from another's checkpoint.

    The parent is not touched, and may be training. The new folder holds the checkpoint, the metrics up to
    it, the tokenizer, and the parent's config as it was at that step with the overrides; facts of its
    checkpoints name the parent as `origin.fork`.

    Args:
        reference: RUN@STEP, or RUN for its newest checkpoint.
        target: a folder that does not exist.
        overrides: ``key=value``.

    Raises:
        UserError: no such run, step or key; a target that exists; an imported model; another model than the
            checkpoint's; samples left out that it has read.
    """
    parent, checkpoint = find_intact(reference)
    target = Path(target)
    if target.exists():
        raise UserError(f"{target}: is there already; name a new folder, or take it away")
    facts = checkpoint.manifest.facts
    tree, origin = config_tree(checkpoint), str(checkpoint.path)
    if "train" not in tree:
        raise UserError(
            f"{parent.path} is an imported model, and no training to go on with; begin one from it: "
            f"plait train CONFIG checkpoint.init_from={parent.path}"
        )
    before = parse_config(tree, origin)
    for section, keys in OWN_KEYS.items():
        tree[section] |= keys
    tree["run"] |= {"dir": str(target)}
    config = override_config(tree, overrides, origin)
    changed_keys(checkpoint, config)
    Plan.from_json(facts["plan"]).leave_out(config.data.skip, first_sample=int(facts["samples"]))
    record = {"run": str(parent.path), "step": checkpoint.step}
    facts = facts | {"origin": facts.get("origin", {}) | {"fork": record}}
    with appearing_at_once(target) as building:
        folder = RunFolder(building)
        try:
            copy_checkpoint(checkpoint, folder.checkpoints, facts)
            folder.config_file.write_text(dump_config(config), encoding="utf-8")
            _bring_metrics(parent, folder, checkpoint.step)
            if tokenizer := parent.tokenizer():
                tokenizer.save_into(building)
            note(building, f"forked from step {checkpoint.step} of {parent.path}")
        except OSError as error:
            raise UserError(f"{target}: {error.strerror}; name another place") from None
    changes = differing_keys(before, config)
    del changes["run.dir"]
    return Fork(RunFolder(target), checkpoint.step, config, changes)


def _bring_metrics(parent: RunFolder, folder: RunFolder, step: int) -> None:
    try:
        records = read_metrics(parent.metrics_file)
    except UserError:
        return
    lines = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    folder.metrics_file.write_text("".join(lines), encoding="utf-8")
