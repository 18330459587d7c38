"""Why a run ends before its last step: a signal, a file in its folder, the clock.

A rank may have a reason that others do not know of. What each wishes travels with a step's sums, so that
all know the same, and end after the same step.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Stopping"]


class Stopping:
    """One rank's reasons to stop, and the reason that all came to know.

    Args:
        file: its being there asks to stop; None on ranks that do not look.
        time_limit: seconds from now; None is for ever.
        signalled: whether a signal asked to stop.

    Attributes:
        reason: why the run ends after the step that is done; None while it goes on.
    """

    def __init__(
        self,
        file: Path | None = None,
        time_limit: float | None = None,
        signalled: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._file, self._limit, self._signalled = file, time_limit, signalled
        self._began = time.monotonic()
        self.reason: str | None = None

    def spent(self, seconds: float) -> None:
        """So much of the time limit is gone already: in earlier lives of the same command."""
        self._began -= seconds

    def wishes(self) -> list[float]:
        """1 for each kind of reason that this rank has, 0 for the others."""
        late = self._limit is not None and time.monotonic() - self._began >= self._limit
        # A disk that does not answer asks for nothing.
        there = self._file is not None and os.path.exists(self._file)
        return [float(self._signalled() is not None), float(there), float(late)]

    def hear(self, sums: Sequence[float]) -> None:
        """Take the sum of all ranks' wishes."""
        signalled, there, late = (total > 0 for total in sums)
        if signalled:
            name = self._signalled()
            self.reason = f"{name} asked for it" if name else "a signal to another rank asked for it"
        elif there:
            self.reason = "a file named stop in its folder asked for it" + self._words()
        elif late:
            self.reason = "train.time_limit is reached"

    def _words(self) -> str:
        """What stands in the file, which says who made it."""
        with suppress(OSError):
            if self._file is not None and (text := self._file.read_text(errors="replace")[:200].strip()):
                return f" ({' '.join(text.split())})"
        return ""

    def obeyed(self) -> None:
        """Take the file away, so that the same command goes on."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
