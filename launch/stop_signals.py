"""Signals that ask a run to stop: once politely, and the second time at once."""

import os
import signal
import sys
from types import FrameType

__all__ = ["StopSignals"]


class StopSignals:
    """Catches the signals from its making on.

    Args:
        launched: `plait launch` started this process and passes on, as SIGUSR1, what it is sent; SIGTERM
            then means that another rank has failed, and Ctrl-C is the launcher's.

    Attributes:
        asked: the name of the signal that came; None while none did.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.asked: str | None = None
        signal.signal(signal.SIGUSR1, self._ask)
        if launched:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            # What waits in a collective would not hear an exception.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print(
                "\nplait: stopping after this step, with a checkpoint; Ctrl-C again ends at once",
                file=sys.stderr,
                flush=True,
            )
