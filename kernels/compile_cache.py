"""Where Triton keeps the kernels that it has compiled: on the machine itself, for one user.

A home directory on a network, Triton's own default, makes thousands of ranks wait for its locks at a run's
start.
"""

import getpass
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

__all__ = ["Cache", "keep_in", "look_at"]

SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "wekafs", "9p", "cifs", "smb", "fuse.", "panfs")
"""How the names of file systems that several machines share begin."""


@dataclass(frozen=True)
class Cache:
    path: Path
    writable: bool
    file_system: str
    """Its type, such as ext4 or nfs4; empty where the machine does not say."""

    @property
    def on_this_machine(self) -> bool:
        return not self.file_system.startswith(SHARED)


def keep_in(folder: str | None) -> Path:
    """Have Triton keep compiled kernels there: `TRITON_CACHE_DIR` for this process and what it starts.

    Args:
        folder: null means what `TRITON_CACHE_DIR` says already, and without it a folder of the user's own
            under `TMPDIR` or /tmp.

    Raises:
        UserError: the folder belongs to somebody else, who could put code of theirs there.
    """
    path = Path(folder or os.environ.get("TRITON_CACHE_DIR") or _default()).expanduser().absolute()
    if path.exists() and path.stat().st_uid not in (os.getuid(), 0):
        raise UserError(
            f"train.kernel_cache = {path} belongs to user {path.stat().st_uid}, whose kernels would run "
            "here; name a folder of your own"
        )
    os.environ["TRITON_CACHE_DIR"] = str(path)
    # Triton 3.10 changes this default; said outright, every version makes the same kernels, and none warns.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return path


def look_at(path: Path) -> Cache:
    """What can be said of a folder, which is made if it can be."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            writable = True
    except OSError:
        writable = False
    return Cache(path, writable, _file_system(path))


def _default() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return str(Path(tempfile.gettempdir()) / f"plait-kernels-{user}")


def _file_system(path: Path) -> str:
    """By the longest mount point above it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    found = {}
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if path.is_relative_to(point):
            found[point] = kind
    return found[max(found, key=len)] if found else ""
