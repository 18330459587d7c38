"""How long a step may take, going by those before it."""

from collections import deque
from dataclasses import dataclass
from statistics import median

__all__ = ["Limit", "Pace"]

RECENT = 20
"""Steps whose median a step is held against."""

FEWEST = 5
"""Steps before which there is no limit: the first ones compile, and read what no cache holds yet."""


@dataclass(frozen=True)
class Limit:
    seconds: float
    words: str
    """What it is, for whoever reads that it was exceeded."""


class Pace:
    """The limit of the next step: a multiple of the recent steps' median, and not less than `least`.

    Args:
        factor: the multiple; None sets no limit.
        least: seconds.
    """

    def __init__(self, factor: float | None, least: float) -> None:
        self._factor, self._least = factor, least
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def took(self, seconds: float) -> None:
        """A step is done."""
        self._seconds.append(seconds)

    def forget(self) -> None:
        """Steps are others from now on."""
        self._seconds.clear()

    def limit(self) -> Limit | None:
        if self._factor is None or len(self._seconds) < FEWEST:
            return None
        typical = median(self._seconds)
        allowed = self._factor * typical
        if allowed >= self._least:
            return Limit(
                allowed, f"{_short(allowed)} s, {self._factor:g} times the median step of {_short(typical)} s"
            )
        return Limit(
            self._least,
            f"{_short(self._least)} s in a step, which is parallel.timeout_least; the median step takes "
            f"{_short(typical)} s",
        )


def _short(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"
