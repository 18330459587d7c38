"""The run and the checkpoint that RUN or RUN@STEP means; without torch, for whoever only looks."""

from pathlib import Path

from ..errors import UserError
from .checkpoint import Checkpoint
from .checkpoint.catalogue import Entry, print_warning, survey, whole_checkpoints
from .run_folder import RunFolder

__all__ = ["choose_checkpoint", "find_checkpoint", "find_entries", "named_run"]


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
