"""Where an export may appear, and how: whole, by a rename, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ...errors import UserError
from .config import MARKER

__all__ = ["appearing", "check_target", "disk_errors"]

EXPORT_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "model.safetensors.index.json",
)


def check_target(out: Path) -> None:
    """Only an earlier export, or an empty folder, gives way to a new one.

    Raises:
        UserError: something else is there, or an earlier export holds files that somebody added.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"{out}: is no folder; choose another name for the export")
    found = sorted(path.name for path in out.iterdir())
    if not found:
        return
    if not _is_export(out):
        raise UserError(f"{out}: exists and is no export of plait; choose another name, or move it away")
    foreign = [name for name in found if name not in EXPORT_FILES and not name.endswith(".safetensors")]
    if foreign:
        raise UserError(
            f"{out}: an earlier export with files that are not its own ({', '.join(foreign[:3])}); "
            "move them away, or choose another name"
        )


def _is_export(out: Path) -> bool:
    try:
        tree = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and str(tree.get(MARKER)).startswith("plait ")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` when all went well and is gone otherwise.

    Raises:
        UserError: the disk refused.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(out):
            temporary.mkdir(parents=True)
        yield temporary
        with disk_errors(out):
            _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{out}: cannot be written: {reason}; make room, or choose another place") from error


def _publish(temporary: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if not out.exists():
        temporary.rename(out)
        return
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
