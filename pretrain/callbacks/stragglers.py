"""Which rank slows the run down, in `run.log`, where one does so for long."""

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from ...parallel.stragglers import host_names
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Stragglers"]

SLOW = 1.5
"""Times the others' work at which a rank is worth a line."""

FEWEST = 5
"""Measured steps that are looked at together, at least."""


class Stragglers(Callback):
    """Looks at the steps of each interval of the log, and tells what has changed; on every rank."""

    def start(self, trainer: "Trainer") -> None:
        self._hosts = host_names(trainer.mesh)
        self._told: int | None = None
        self._seen: list[dict[str, Any]] = []

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if "slowest_rank" in metrics:
            self._seen.append(metrics)
        if metrics["step"] % trainer.config.log.every or len(self._seen) < FEWEST:
            return
        seen, self._seen = self._seen, []
        rank, times = Counter(one["slowest_rank"] for one in seen).most_common(1)[0]
        share = median(one["slowest_share"] for one in seen)
        slow = rank if share > SLOW and 2 * times > len(seen) else None
        if slow == self._told:
            return
        if slow is None:
            trainer.say(f"slow no longer: rank {self._told} on {self._hosts[self._told or 0]}")
        else:
            trainer.say(
                f"slow: rank {rank} on {self._hosts[rank]} works {share:.1f} times as long on a step as the "
                f"other ranks' median; {_along(seen)}"
            )
        self._told = slow


def _along(seen: list[dict[str, Any]]) -> str:
    """The axis that is least even, as the steps have it."""
    ratios = {axis: median(one["stragglers"][axis] for one in seen) for axis in seen[0]["stragglers"]}
    axis = max(ratios, key=ratios.__getitem__)
    place = Counter(one["straggler_places"][axis] for one in seen).most_common(1)[0][0]
    return f"along {axis}, place {place} works {ratios[axis]:.1f} times as long as the others"
