"""The names of checkpoint folders, and how a whole checkpoint takes its place among them.

    step-00000100          a checkpoint
    .tmp-step-00000100     one being written, or left over by a run that died
    .old-step-00000100     one that a newer save of the same step is replacing
    .tmp-removed-...       one being deleted

Every change of a checkpoint's standing is one rename, so that whoever looks, at any moment or after
a crash, finds whole checkpoints and nothing that looks like one.
"""

import re
import shutil
from pathlib import Path

from ...errors import UserError
from .files import sync_folder
from .manifest import read_manifest

__all__ = ["folder_name", "folder_step", "publish", "remove", "temporary_name", "tidy"]

FOLDER = re.compile(r"(?:\.old-)?step-([0-9]{8,12})", re.ASCII)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_name(step: int) -> str:
    return f".tmp-{folder_name(step)}"


def folder_step(path: Path) -> int | None:
    """The step of a checkpoint's folder, also of one that is being replaced; None for any other."""
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def tidy(folder: Path) -> None:
    """Clear up after a save that did not live to its end.

    What a file system will not let go of yet, such as a file that some reader holds open on NFS, is
    left for the next time.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(".tmp-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".old-") and FOLDER.fullmatch(path.name):
            _settle(path, folder / path.name.removeprefix(".old-"))


def _settle(aside: Path, final: Path) -> None:
    if _is_whole(final):
        remove(aside)
        return
    if final.exists():
        remove(final)
    aside.rename(final)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name, in place of any that bears it.

    Whatever moment the machine dies at, `temporary`'s predecessor or itself is to be found: under
    `final` or, between two renames, as `.old-…`, which `tidy` brings back.
    """
    sync_folder(temporary)
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    if aside.exists():
        remove(aside)


def remove(path: Path) -> None:
    """Delete a checkpoint so that it is never seen in part; what resists is left to `tidy`."""
    doomed = path.with_name(f".tmp-removed-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True
