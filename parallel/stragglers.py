"""Which rank is slow: how long each itself works on a step, without what it waits for others.

All ranks take equally long for a step, since they wait for each other; the slow one is who waits least.
"""

import socket
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from .axes import AXES
from .mesh import Mesh

__all__ = ["Works", "find_stragglers", "host_names"]

SAMPLED = 4
"""On a GPU one step of so many is measured: its events cost the host some time."""

LEAST_WORK = 1e-6
"""Seconds. What a GPU's events say may exceed the host's step by as little."""


class Works:
    """This rank's work on the step before, in seconds, as a message to all.

    A step's own work is known when its last message is sent: it travels with the next step's.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._steps = 0
        self._work = 0.0

    def begin(self) -> None:
        """A step begins, with its wait for data."""
        self._mesh.waits.begin(measured=self._steps % SAMPLED == 0)
        self._steps += 1

    def end(self, seconds: float) -> None:
        """It is done, after so many seconds."""
        waited = self._mesh.waits.seconds()
        self._work = 0.0 if waited is None else max(LEAST_WORK, seconds - waited)

    def message(self) -> list[float]:
        """Numbers whose sum over the ranks is the work of each, 0 where it was not measured; none on one
        rank."""
        ranks = self._mesh.world_size
        return [self._work if rank == self._mesh.rank else 0.0 for rank in range(ranks)] if ranks > 1 else []


def find_stragglers(works: Sequence[float], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Metrics of who is slow.

    Args:
        works: seconds of each rank.
        sizes: axis -> ranks.

    Returns:
        slowest_rank: who worked longest.
        slowest_share: its work over the median of the other ranks'; 1 is even.
        stragglers: for each axis that has several ranks, the longest work of a place on it, as the mean of
            the ranks there, over the mean of those elsewhere.
        straggler_places: which place that is.
        Nothing where a rank's work is not known.
    """
    if len(works) < 2 or min(works) <= 0:
        return {}
    slowest = max(range(len(works)), key=works.__getitem__)
    grid = torch.tensor(works, dtype=torch.float64).view([sizes[axis] for axis in AXES])
    ratios, places = {}, {}
    for dim, axis in enumerate(AXES):
        if sizes[axis] > 1:
            by_place = grid.movedim(dim, 0).flatten(1).mean(1)
            place = places[axis] = int(by_place.argmax())
            others = (by_place.sum() - by_place[place]) / (sizes[axis] - 1)
            ratios[axis] = float(by_place[place] / others)
    return {
        "slowest_rank": slowest,
        "slowest_share": works[slowest] / median([*works[:slowest], *works[slowest + 1 :]]),
        "stragglers": ratios,
        "straggler_places": places,
    }


def host_names(mesh: Mesh) -> list[str]:
    """The host of each rank; all ranks ask alike."""
    names = [socket.gethostname()]
    if mesh.world_size > 1:
        names = [""] * mesh.world_size
        dist.all_gather_object(names, socket.gethostname())
    return names
