"""Which checkpoints a folder holds, which of them are whole, and which a new one makes superfluous."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .folders import folder_step
from .saved import Checkpoint

__all__ = ["Entry", "in_order", "print_warning", "superfluous", "survey", "whole_checkpoints"]


@dataclass(frozen=True)
class Entry:
    """A folder that bears a checkpoint's name."""

    checkpoint: Checkpoint
    fault: str | None
    """Why it is not whole, in one line; None where it is."""


def survey(folder: Path) -> list[Entry]:
    """All that bear a checkpoint's name, by step; files are looked at, and not read.

    Raises:
        OSError: the folder is there and cannot be listed.
    """
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    found: dict[Path, Entry] = {}
    # Sorted, `.old-step-00000100` comes before the `step-00000100` that supersedes it.
    for path in paths:
        step = folder_step(path)
        if step is None:
            continue
        checkpoint = Checkpoint(path, step)
        fault = _fault(checkpoint)
        # One that is gone by now was pruned meanwhile, and nobody misses it.
        if fault is not None and not path.exists():
            continue
        if fault is None:
            found.pop(path.with_name(f".old-{path.name}"), None)
        found[path] = Entry(checkpoint, fault)
    return sorted(found.values(), key=lambda entry: entry.checkpoint.step)


def _fault(checkpoint: Checkpoint) -> str | None:
    try:
        step = checkpoint.manifest.step
    except UserError as error:
        return str(error)
    if step != checkpoint.step:
        return f"{checkpoint.path}: its manifest says step {step}; rename it"
    return None


def whole_checkpoints(folder: Path, warn: Callable[[str], None]) -> list[Checkpoint]:
    """All whole checkpoints in the order they were saved, the newest last.

    Args:
        warn: is told, in one line, of each that is not whole.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        entries = survey(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; mend the folder or choose another run.dir") from None
    for entry in entries:
        if entry.fault is not None:
            warn(f"checkpoint skipped: {entry.fault}")
    return in_order(entries)


def in_order(entries: Sequence[Entry]) -> list[Checkpoint]:
    """The whole ones in the order they were saved, the newest last."""
    whole = [entry.checkpoint for entry in entries if entry.fault is None]
    return sorted(whole, key=lambda checkpoint: (checkpoint.manifest.serial, checkpoint.step))


def superfluous(checkpoints: Sequence[Checkpoint], keep: int, every: int | None) -> list[Checkpoint]:
    """Those that need not stay.

    Args:
        checkpoints: in the order they were saved.
        keep: how many of the newest stay.
        every: those of a step that is a multiple of it stay for ever; None for none.
    """
    return [one for one in checkpoints[:-keep] if every is None or one.step % every]


def print_warning(message: str) -> None:
    print(f"plait: warning: {message}", file=sys.stderr)
