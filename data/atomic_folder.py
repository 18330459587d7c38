"""A folder that appears under its name complete or not at all, filled by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

__all__ = ["appearing_at_once"]


@contextmanager
def appearing_at_once(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``out`` at the end and vanishes if anything fails, with
    the folders above that had to be made.

    What a killed build left behind is cleared by the next; a build at work is told by its lock.
    """
    folder = out.with_name(f".{out.name}.building")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made here: {error.strerror}; name another place") from None
    try:
        _lock(lock, folder, out)
        _clear(folder)
        try:
            yield folder
            _replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()
            raise
    finally:
        os.close(lock)


def _lock(lock: int, folder: Path, out: Path) -> None:
    busy = UserError(f"{out}: another build is writing it; wait for it or name another folder")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    # Between opening and locking, the other build may have finished and renamed what was opened.
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return
    raise busy


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    folder.rename(out)
    shutil.rmtree(old)
