"""The checkpoint that is loaded: rank 0 chooses it for all ranks, and all of them read it before it counts.

What ranks see of a network's disk may differ for a while, so none but the first looks for itself. The files
are compared with their checksums by all ranks together, each file by one of them.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ...errors import UserError, few
from .catalogue import whole_checkpoints
from .manifest import check_size
from .saved import Checkpoint

__all__ = ["from_first_rank", "newest_intact", "require_intact"]

READERS = 4
"""Files that a rank reads at a time, where it has the cores: one hashes slower than a good disk reads."""

T = TypeVar("T")


def newest_intact(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that was saved last of those whose every byte is as it was written, or None. Every rank
    of the process group, where there is one, calls this alike and gets the same.

    Args:
        warn: on rank 0, is told in one line of each that is passed over.

    Raises:
        UserError: the folder cannot be listed; on all ranks.
    """
    for checkpoint in reversed(from_first_rank(lambda: whole_checkpoints(folder, warn))):
        damages = _damages(checkpoint)
        if not damages:
            return checkpoint
        if _place()[0] == 0:
            warn(f"checkpoint skipped: {few(damages, most=1)}")
    return None


def require_intact(checkpoint: Checkpoint) -> None:
    """Read every byte, all ranks together.

    Raises:
        UserError: the first file that is missing, cut short or damaged; on all ranks.
    """
    if damages := _damages(checkpoint):
        raise UserError(damages[0])


def from_first_rank(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; a `UserError` there is raised everywhere."""
    rank, size = _place()
    if size == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def _damages(checkpoint: Checkpoint) -> list[str]:
    """A line each, whichever rank found it; the same on all.

    Args:
        checkpoint: with the manifest as rank 0 read it.
    """
    rank, size = _place()
    everybodys: list[Any] = [_damages_here(checkpoint, rank, size)]
    if size > 1:
        import torch.distributed as dist

        mine = everybodys[0]
        everybodys = [None] * size
        dist.all_gather_object(everybodys, mine)
    found = dict.fromkeys(damage for damages in everybodys for damage in damages)
    return list(found) or from_first_rank(lambda: _faults_of_index(checkpoint))


def _damages_here(checkpoint: Checkpoint, rank: int, size: int) -> list[str]:
    # Largest first, so that ranks have about as much to read.
    files = sorted(checkpoint.manifest.files.values(), key=lambda one: (-one.size, one.name))
    try:
        for record in files:
            check_size(checkpoint.path, record)
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(_readers()) as pool:
        return [damage for damage in pool.map(checkpoint.damage_of, files[rank::size]) if damage]


def _faults_of_index(checkpoint: Checkpoint) -> list[str]:
    try:
        _ = checkpoint.tensors
    except UserError as error:
        return [str(error)]
    return []


def _readers() -> int:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(READERS, (os.cpu_count() or 1) // here))


def _place() -> tuple[int, int]:
    """This rank and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
