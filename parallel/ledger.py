"""What ranks said to each other: an entry a collective, in the order of events on this rank.

A ledger is asked for with `Mesh.record`; without one nothing is noted. Tests read the order of events,
benchmarks the bytes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = ["Direction", "Entry", "Ledger", "Mark"]

Direction = Literal["forward", "backward", "recompute"]


@dataclass
class Entry:
    """One collective, as this rank took part in it."""

    axis: str
    kind: str
    layer: int | None
    """The layer it belongs to; None outside of the layers."""
    direction: Direction
    sent: int
    """Bytes that leave this rank, by an algorithm that sends no byte twice to the same place."""
    launched: int
    """Place in the order of this rank's events."""
    waited: int | None = None
    """Likewise, of the moment its result was asked for; None while nobody has."""
    seconds: float = 0.0
    """From the launch until its result was there."""


@dataclass(frozen=True)
class Mark:
    """A computation that a test or a benchmark wants to see among the collectives."""

    label: str
    direction: Direction
    at: int


@dataclass
class Ledger:
    entries: list[Entry] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    layer: int | None = None
    """The layer that is being computed."""
    _events: int = 0

    def launch(
        self, axis: str, kind: str, sent: int, layer: int | None, direction: Direction | None = None
    ) -> Entry:
        """Note that a collective begins."""
        entry = Entry(axis, kind, layer, direction or self.direction(), sent, self._next())
        entry.seconds = -time.perf_counter()
        self.entries.append(entry)
        return entry

    def wait(self, entry: Entry) -> None:
        """Note that a collective's result is asked for, and there."""
        entry.waited = self._next()
        entry.seconds += time.perf_counter()

    def mark(self, label: str, direction: Direction | None = None) -> None:
        """Note a computation."""
        self.marks.append(Mark(label, direction or self.direction(), self._next()))

    @contextmanager
    def of_layer(self, layer: int) -> Iterator[None]:
        """What is launched inside belongs to `layer`."""
        before, self.layer = self.layer, layer
        try:
            yield
        finally:
            self.layer = before

    def sent(self, **where: object) -> int:
        """Bytes sent by the entries that agree with all of axis, kind, layer, direction as given."""
        return sum(e.sent for e in self.entries if all(getattr(e, k) == v for k, v in where.items()))

    def direction(self) -> Direction:
        """Of what happens now. Within a backward pass, a layer that is being computed is a repetition."""
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        return "backward" if self.layer is None else "recompute"

    def _next(self) -> int:
        self._events += 1
        return self._events
