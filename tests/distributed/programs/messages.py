"""Every collective with its gradient, on tensors that each rank draws from its place."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plait.parallel import collectives, travel
from plait.parallel.axes import AXES
from plait.parallel.ledger import Ledger
from plait.parallel.mesh import Mesh

SEND = ((1, 0, 2, 3), (0, 4, 1, 0), (2, 2, 0, 1), (0, 0, 0, 0))
"""Rows from each rank (line) to each rank (column), for the uneven all-to-all; the last sends none."""


def drawn(place: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(place))


def run(axis: str) -> dict[str, Any]:
    """For each collective its output, the gradient of its input under weights drawn alike, and the bytes
    that the ledger has for both directions."""
    size = dist.get_world_size()
    sizes = dict.fromkeys(AXES, 1) | {axis: size}
    mesh = Mesh.create(sizes, rank=dist.get_rank(), world_size=size)
    along = mesh.connect(torch.device("cpu")).axes[axis]
    place = along.place
    send = [row[:size] for row in SEND[:size]]
    calls = {
        "all_gather": ((2, 3, 5), lambda x: collectives.all_gather(x, along, 1)),
        "reduce_scatter": ((2, 3 * size, 5), lambda x: collectives.reduce_scatter(x, along, 1)),
        "all_reduce": ((3, 7), lambda x: collectives.all_reduce(x, along)),
        "all_to_all": (
            (sum(send[place]), 3),
            lambda x: collectives.all_to_all(x, along, send[place], [row[place] for row in send]),
        ),
        "stacked": ((2, 3), lambda x: travel.start_all_gather(x, along).wait()),
    }
    if place != size - 1 - place:
        calls["swap"] = ((2, 4), lambda x: travel.swap_later(x, along, size - 1 - place).wait())
    found = {}
    for kind, (shape, call) in calls.items():
        x = drawn(place, *shape).requires_grad_()
        along.ledger = ledger = Ledger()
        out = call(x)
        (out * drawn(100 + place, *out.shape)).sum().backward()
        along.ledger = None
        sent = {(e.direction, e.kind): e.sent for e in ledger.entries}
        assert all(e.waited is not None and e.waited > e.launched for e in ledger.entries)
        axes = {e.axis for e in ledger.entries}
        found[kind] = {"out": out.detach(), "grad": x.grad, "sent": sent, "axes": axes}
    return found
