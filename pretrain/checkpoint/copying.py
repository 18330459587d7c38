"""A checkpoint in another run's folder: the same bytes, facts of its own."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import FileRecord, read_back, sync_folder
from .folders import folder_name
from .manifest import put_manifest
from .saved import Checkpoint

__all__ = ["copy_checkpoint"]


def copy_checkpoint(checkpoint: Checkpoint, folder: Path, facts: Mapping[str, Any]) -> Checkpoint:
    """Put a checkpoint among those of another folder.

    Its files are linked where the disk allows it, since nobody writes into them: then neither run's pruning
    takes them from the other, and they take no room. Else they are copied, and read back.

    Args:
        folder: is made.
        facts: in the place of its own.

    Raises:
        OSError: the disk refused, or read back something else than the checkpoint holds.
    """
    target = folder / folder_name(checkpoint.step)
    target.mkdir(parents=True)
    for record in checkpoint.manifest.files.values():
        _bring(checkpoint.path, target, record)
    put_manifest(target, replace(checkpoint.manifest, facts=dict(facts)))
    sync_folder(target)
    return Checkpoint(target, checkpoint.step)


def _bring(source: Path, target: Path, record: FileRecord) -> None:
    try:
        os.link(source / record.name, target / record.name)
    except OSError:
        shutil.copyfile(source / record.name, target / record.name)
        descriptor = os.open(target / record.name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        read_back(target / record.name, record)
