"""What a config asks of this process: its place in the layout and its device."""

import os

import torch

from ..errors import UserError
from ..parallel.mesh import Mesh
from .config import Config, ParallelConfig

__all__ = ["device_of", "mesh_of", "place_in"]


def mesh_of(config: Config) -> Mesh:
    """The layout that `parallel` asks for, and this rank's place in it; nobody is spoken to yet.

    Raises:
        UserError: another number of ranks was started.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return place_in(config.parallel, rank, world_size)


def place_in(parallel: ParallelConfig, rank: int, world_size: int) -> Mesh:
    """A rank's place in a layout.

    Raises:
        UserError: the layout is not of `world_size` ranks.
    """
    return Mesh.create(
        parallel.sizes,
        rank=rank,
        world_size=world_size,
        state_exchange=parallel.state_exchange,
        fold_queries=parallel.fold_queries,
        keep_dispatched=parallel.keep_dispatched,
    )


def device_of(config: Config) -> torch.device:
    """The device that `train.device` asks for.

    Raises:
        UserError: cuda on a machine without a GPU that torch can use.
    """
    wanted = config.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda but torch sees no GPU here; set train.device = cpu")
    return torch.device(wanted)
