"""How long this rank waits for others: the part of a step that is not its own work."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["StreamWaits", "Waits", "waits_on"]

T = TypeVar("T")


class Waits:
    """Adds up, by the clock, what this rank's computing thread spends inside ``with waits:``."""

    def __init__(self) -> None:
        self._seconds = self._since = 0.0

    def begin(self, measured: bool = True) -> None:
        """A step begins.

        Args:
            measured: whether its waits are worth an effort; on a CPU they cost none.
        """
        self._seconds = 0.0

    def seconds(self) -> float | None:
        """Waited since `begin`; None where it was not measured."""
        return self._seconds

    def during(self, collective: Callable[[], T]) -> T:
        """Call one that returns when the others have come, not before."""
        with self:
            return collective()

    def since(self, moment: float) -> None:
        """A collective that nobody could enclose began at this moment of `time.perf_counter`, and is done."""
        self._seconds += time.perf_counter() - moment

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.since(self._since)


class StreamWaits(Waits):
    """On a GPU, where a wait only holds up the stream that computes: between an event before and one after.

    Collectives that the host calls at once run on streams of their own and are waited for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._measured = False
        self._events: list[torch.cuda.Event] = []

    def begin(self, measured: bool = True) -> None:
        self._measured = measured
        self._events.clear()

    def seconds(self) -> float | None:
        """Of waits that the stream is through with; the host waits for the last of them."""
        if not self._measured:
            return None
        if self._events:
            self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return sum(before.elapsed_time(after) for before, after in pairs) / 1000

    def during(self, collective: Callable[[], T]) -> T:
        return collective()

    def since(self, moment: float) -> None:
        pass

    def __enter__(self) -> None:
        self._note()

    def __exit__(self, *exception: object) -> None:
        self._note()

    def _note(self) -> None:
        if self._measured:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)


def waits_on(device: torch.device) -> Waits:
    return StreamWaits() if device.type == "cuda" else Waits()
