"""Run by test_ranks.py, once a rank: DTensors saved and loaded in several layouts.

Arguments: folder, rank, number of ranks. The folder holds `one/`, saved by one rank, and gets `many/`.
"""

import errno
import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from plait.pretrain.checkpoint import CheckpointError, Checkpoints, files, storage

Usage = namedtuple("Usage", "total used free")


def whole_tensors() -> dict[str, Tensor]:
    """What every layout holds; `uneven` and `single` leave ranks with less or nothing."""
    return {
        "even": torch.arange(48, dtype=torch.float32).reshape(8, 6),
        "uneven": torch.arange(20, dtype=torch.float64).reshape(5, 4).bfloat16(),
        "columns": torch.arange(24).reshape(4, 6),
        "single": torch.tensor([7.0]),
        "replicated": torch.arange(3.0),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "plain": torch.arange(9) % 2 == 0,
    }


ROWS: dict[str, Placement | None] = {
    "even": Shard(0),
    "uneven": Shard(0),
    "columns": Shard(1),
    "single": Shard(0),
    "replicated": Replicate(),
    "scalar": Replicate(),
    "plain": None,
}
OTHERWISE: dict[str, Placement | None] = {
    "even": Shard(1),
    "uneven": Shard(1),
    "columns": Shard(0),
    "single": Replicate(),
    "replicated": Shard(0),
    "scalar": None,
    "plain": Shard(0),
}


def distributed(
    mesh: DeviceMesh, layout: dict[str, Placement | None], fill: float | None = None
) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in whole_tensors().items():
        placement = layout[name]
        if fill is not None:
            tensor.fill_(fill)
        tensors[name] = tensor if placement is None else distribute_tensor(tensor, mesh, [placement])
    return tensors


def assert_whole(tensors: dict[str, Tensor]) -> None:
    for name, expected in whole_tensors().items():
        tensor = tensors[name]
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, expected), name


def check_saved_by_many(folder: Path, mesh: DeviceMesh) -> None:
    checkpoints = Checkpoints(folder / "many", keep=1, background=True)
    for step in (1, 2):
        tensors = distributed(mesh, ROWS)
        checkpoints.save(step, tensors, {"step": step})
        for tensor in tensors.values():
            tensor.zero_()
        dist.barrier()  # training's own messages go on beside those of the save
    checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 2
    for layout in (ROWS, OTHERWISE):
        tensors = distributed(mesh, layout, fill=1)
        newest.load_into(tensors)
        assert_whole(tensors)
    check_failure_reaches_all(checkpoints, mesh)
    check_free_space_is_that_of_all(checkpoints, mesh)


def check_failure_reaches_all(checkpoints: Checkpoints, mesh: DeviceMesh) -> None:
    """The last rank's disk is full; all ranks learn of it, and step 2 stays."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == dist.get_world_size() - 1:
            patch.setattr(storage.os, "fsync", full)
        checkpoints.save(3, distributed(mesh, ROWS), {})
        with pytest.raises(CheckpointError, match="not written: No space left"):
            checkpoints.wait()
    dist.barrier()
    assert os.listdir(checkpoints.folder) == ["step-00000002"]


def check_free_space_is_that_of_all(checkpoints: Checkpoints, mesh: DeviceMesh) -> None:
    """Rank 0 reckons for all ranks before any of them writes; its answer reaches them."""
    whole = sum(tensor.nbytes for tensor in whole_tensors().values())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(files.shutil, "disk_usage", lambda _: Usage(1 << 50, 0, whole))
        checkpoints.save(3, distributed(mesh, ROWS), {})
        with pytest.raises(
            CheckpointError, match=f"not written: it takes [0-9,]+ bytes and {whole:,} are free"
        ):
            checkpoints.wait()
    dist.barrier()
    assert os.listdir(checkpoints.folder) == ["step-00000002"]


def check_saved_by_one(folder: Path, mesh: DeviceMesh) -> None:
    (checkpoint,) = Checkpoints(folder / "one").all()
    for layout in (ROWS, OTHERWISE):
        tensors = distributed(mesh, layout, fill=1)
        checkpoint.load_into(tensors)
        assert_whole(tensors)


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    check_saved_by_one(folder, mesh)
    check_saved_by_many(folder, mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
