"""A reduce-scatter that cannot be."""

import torch
import torch.distributed as dist

from plait.parallel.axes import AXES
from plait.parallel.collectives import reduce_scatter
from plait.parallel.mesh import Mesh


def run() -> None:
    size = dist.get_world_size()
    mesh = Mesh.create(dict.fromkeys(AXES, 1) | {"sp": size}, rank=dist.get_rank(), world_size=size)
    reduce_scatter(torch.zeros(5, 2), mesh.connect(torch.device("cpu")).sp, 0)
