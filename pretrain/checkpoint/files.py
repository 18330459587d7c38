"""Files that reach the disk: hashed as they grow, synced before they are closed, read back afterwards."""

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError

__all__ = [
    "CheckpointError",
    "FileRecord",
    "HashingFile",
    "check_free_space",
    "checksum",
    "not_written",
    "read_back",
    "sync_folder",
    "write_file",
]

PIECE = 4 << 20
"""Bytes hashed and written at a time: small enough to be still in the cache for the second of the two."""

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "mend the permissions",
    errno.EPERM: "mend the permissions",
    errno.EROFS: "mount it for writing",
}


class CheckpointError(UserError):
    """A checkpoint could not be written: the disk is full, or the folder cannot be written to.

    Older checkpoints are as they were, so that training may go on and try again at the next one.
    """


@dataclass(frozen=True)
class FileRecord:
    """What a complete file looks like."""

    name: str
    size: int
    sha256: str


class HashingFile:
    """A new file that knows its checksum as it grows and reaches the disk before it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._stream = open(path, "xb")  # noqa: SIM115

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def append(self, data: memoryview | bytes) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._hash.update(piece)
            self._stream.write(piece)
        self.size += len(data)

    def pad(self, alignment: int) -> None:
        self.append(bytes(-self.size % alignment))

    def finish(self) -> FileRecord:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return FileRecord(self.path.name, self.size, self._hash.hexdigest())


def write_file(path: Path, text: str) -> FileRecord:
    """Write a new text file, down to the disk, and read it back."""
    with HashingFile(path) as file:
        file.append(text.encode())
        record = file.finish()
    read_back(path, record)
    return record


def read_back(path: Path, record: FileRecord) -> None:
    """Read a file that has just been synced, and compare it with what was written.

    Raises:
        OSError: it cannot be read, or holds something else.
    """
    if checksum(path, from_disk=True) != record.sha256:
        raise OSError(errno.EIO, f"{path.name} reads back other than it was written")


def checksum(path: Path, *, from_disk: bool = False) -> str:
    """The sha256 of a file.

    Args:
        from_disk: not what memory still holds of it, where the system can forget that.
    """
    with open(path, "rb") as stream:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the folder's entries, such as a rename within it, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(folder: Path, needed: int, target: Path) -> None:
    """
    Args:
        needed: bytes that are about to be written into the folder.
        target: what they are to become; opens the error's line.

    Raises:
        CheckpointError: the folder's disk has not so many left.
    """
    usage = shutil.disk_usage(folder)
    # File systems that do not count say that they have no bytes at all.
    if usage.total and usage.free < needed:
        raise not_written(
            target,
            f"it takes {needed:,} bytes and {usage.free:,} are free",
            REMEDIES[errno.ENOSPC],
        )


def not_written(target: Path, reason: OSError | str, remedy: str | None = None) -> CheckpointError:
    """The error for a checkpoint that is not there."""
    if isinstance(reason, OSError):
        remedy = REMEDIES.get(reason.errno or 0, "look after the folder and its disk")
        reason = reason.strerror or str(reason)
    return CheckpointError(f"{target}: not written: {reason}; {remedy}; older checkpoints are as they were")
