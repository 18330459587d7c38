"""Tensors filled with what a checkpoint holds, after a check that it fits them."""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from ...errors import UserError, few
from ...parallel.placements import local, part
from .index import StoredTensor, describe
from .planning import PartLoadPlanner
from .storage import RankFileReader

__all__ = ["check_fits", "convert", "fill", "first_cause", "silence_single_process_warning"]


def fill(
    tensors: Mapping[str, Tensor],
    folder: Path,
    index: Mapping[str, StoredTensor],
    partial: bool,
    growing: Collection[str] = (),
) -> None:
    """Fill tensors in place; see `Checkpoint.load_into`.

    Args:
        index: the checked `metadata.json` of the folder.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and cannot be filled; materialise it first")
    check_fits(tensors, folder, index, partial, growing)
    # Of what is asked for only: who reads a checkpoint tensor by tensor does not plan all of it each time.
    reader = RankFileReader(folder, {name: index[name] for name in tensors})
    silence_single_process_warning()
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=PartLoadPlanner(), no_dist=True)
    except CheckpointException as error:
        raise first_cause(error) from None


def convert(
    tensors: Mapping[str, Tensor], folder: Path, index: Mapping[str, StoredTensor], growing: Collection[str]
) -> None:
    """Fill tensors of any dtype in place; see `Checkpoint.convert_into`."""
    other = {n for n, tensor in tensors.items() if n in index and index[n].dtype != tensor.dtype}
    same = {name: tensor for name, tensor in tensors.items() if name not in other}
    fill(same, folder, index, partial=True, growing=growing)
    for name in other:
        read = torch.empty_like(tensors[name], dtype=index[name].dtype)
        fill({name: read}, folder, index, partial=True, growing=growing)
        rows = _rows_within(read, index[name].shape[0]) if name in growing else None
        local(tensors[name]).detach()[:rows].copy_(local(read)[:rows])


def _rows_within(tensor: Tensor, end: int) -> int:
    """How many rows of this rank's part lie before the whole's row `end`."""
    held = part(tensor)[0]
    return max(0, min(held.stop, end) - held.start)


def check_fits(
    tensors: Mapping[str, Tensor],
    folder: Path,
    stored: Mapping[str, StoredTensor],
    partial: bool,
    growing: Collection[str] = (),
) -> None:
    """
    Args:
        tensors: to be filled; shape and dtype are all that is looked at.
        stored: what the checkpoint in the folder holds.

    Raises:
        UserError: it has others, and, unless `partial`, more.
    """
    missing = [name for name in tensors if name not in stored]
    unknown = [] if partial else [name for name in stored if name not in tensors]
    faults = []
    if missing:
        faults.append(f"it lacks {few(missing)}")
    if unknown:
        faults.append(f"it also holds {few(unknown)}")
    if faults:
        raise UserError(
            f"{folder}: not a checkpoint of this model: {' and '.join(faults)}; "
            "use the config it was saved with, or start in another run.dir"
        )
    differ = []
    for name, tensor in tensors.items():
        here = describe(tensor)
        there = describe(stored[name])
        if here != there and not (name in growing and _is_longer(tensor, stored[name])):
            differ.append(f"{name} ({there} saved, {here} asked for)")
    if differ:
        raise UserError(
            f"{folder}: not a checkpoint of this model: other shape or dtype of {few(differ)}; "
            "use the config it was saved with, or start in another run.dir"
        )


def _is_longer(tensor: Tensor, stored: StoredTensor) -> bool:
    """Whether it differs in having more rows alone."""
    rows, *others = tensor.shape
    return tensor.dtype == stored.dtype and (*others,) == stored.shape[1:] and rows > stored.shape[0]


def first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks that failed; DCP wraps even a KeyboardInterrupt."""
    return error.failures[min(error.failures)][0]


def silence_single_process_warning() -> None:
    """DCP warns, at each call, that one process is all there is, which is what it was called for."""
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning
    )
