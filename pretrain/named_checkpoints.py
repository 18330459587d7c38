"""The run and the checkpoint that RUN or RUN@STEP means; without torch, for whoever only looks."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .checkpoint import Checkpoint
from .checkpoint.catalogue import Entry, print_warning, survey, whole_checkpoints
from .checkpoint.intact import from_first_rank, newest_intact, require_intact
from .run_folder import RunFolder

__all__ = [
    "choose_checkpoint",
    "choose_intact",
    "find_checkpoint",
    "find_entries",
    "find_intact",
    "named_run",
]


def named_run(reference: str) -> tuple[RunFolder, str | None]:
    """The run, and the step that stands behind an @.

    Raises:
        UserError: no such run.
    """
    path, step = reference, None
    if "@" in reference and not Path(reference).is_dir():
        path, _, step = reference.rpartition("@")
    return RunFolder.open(path), step


def find_checkpoint(reference: str) -> tuple[RunFolder, Checkpoint]:
    """The run and the checkpoint that RUN or RUN@STEP means.

    Raises:
        UserError: no such run, or no whole checkpoint of that step.
    """
    folder, step = named_run(reference)
    return folder, choose_checkpoint(folder, step)


def choose_checkpoint(folder: RunFolder, step: str | None, *, remedy: str = "train on") -> Checkpoint:
    """A run's checkpoint of a step, or its newest.

    Args:
        remedy: what to do where there is none yet; closes the error's line.

    Raises:
        UserError: no whole checkpoint, or none of that step.
    """
    found = whole_checkpoints(folder.checkpoints, print_warning)
    if not found:
        raise UserError(f"{folder.path}: holds no whole checkpoint yet; {remedy}")
    if step is None:
        return found[-1]
    for checkpoint in found:
        if str(checkpoint.step) == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise UserError(f"{folder.path}: holds no checkpoint of step {step}; choose one of {steps}")


def find_intact(reference: str, warn: Callable[[str], None] = print_warning) -> tuple[RunFolder, Checkpoint]:
    """What is to be loaded by RUN or RUN@STEP, after every byte of it was read; see `choose_intact`."""
    folder, step = named_run(reference)
    return folder, choose_intact(folder, step, warn=warn)


def choose_intact(
    folder: RunFolder,
    step: str | None,
    *,
    remedy: str = "train on",
    warn: Callable[[str], None] = print_warning,
) -> Checkpoint:
    """A run's checkpoint of a step, or the newest whose every byte is as it was written. Every rank of the
    process group, where there is one, calls this alike and gets the same.

    Args:
        remedy: what to do where there is none yet; closes the error's line.
        warn: is told, in one line, of each that is passed over.

    Raises:
        UserError: none of that step, or it is damaged; or none at all is intact.
    """
    if step is None:
        newest = newest_intact(folder.checkpoints, warn)
        if newest is None:
            raise UserError(f"{folder.path}: holds no whole checkpoint yet; {remedy}")
        return newest

    def named() -> Checkpoint:
        for entry in find_entries(folder):
            if str(entry.checkpoint.step) == step and entry.fault is not None:
                raise UserError(entry.fault)
        return choose_checkpoint(folder, step, remedy=remedy)

    chosen = from_first_rank(named)
    require_intact(chosen)
    return chosen


def find_entries(folder: RunFolder) -> list[Entry]:
    """All that bear a checkpoint's name, whole or not, by step.

    Raises:
        UserError: there is none, or the folder cannot be listed.
    """
    try:
        entries = survey(folder.checkpoints)
    except OSError as error:
        raise UserError(f"{folder.checkpoints}: {error.strerror}; mend the folder") from None
    if not entries:
        raise UserError(f"{folder.path}: holds no checkpoint yet; train on")
    return entries
