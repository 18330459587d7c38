"""The watchdog: a rank that makes no progress says where it stands, and ends the run."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, Self

from .failures import Failure, Kind, hang_line, tell
from .pace import Limit
from .roll_call import GRACE, RollCall

__all__ = ["Watchdog"]

PACKAGE = Path(__file__).resolve().parent.parent


class _Beat(NamedTuple):
    label: str
    limit: Limit | None


class Watchdog:
    """Ends this process when nothing calls :meth:`beat` for `timeout` seconds, or for a step's limit.

    In a hang all ranks fall silent, so each would speak for itself; the first to do so calls on the
    others through the ranks' store, and they answer if they are silent too. Each writes the stacks of
    all its threads into its log and a :class:`Failure` for its launcher, waits a little for the others, and
    exits with 1. Where the launcher is not `plait launch`, each also writes to standard error, and the first
    one a line about all. A rank whose interpreter does not run at all is ended by a timer that needs none.

    A rank that is long at what no step's limit is for, such as writing to a slow disk, excuses itself, so
    that those who wait for it in their step go by the timeout too.

    Use it in a ``with`` block; it watches as long as that lasts.

    Args:
        timeout: seconds.
        log: the rank's log file.
        launched: `plait launch` started this rank, and tells what is to be told.
        note: is given the line about all, where it is told here.
    """

    def __init__(
        self,
        timeout: float,
        log: Path,
        *,
        launched: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._timeout = Limit(timeout, f"{timeout:g} s")
        self.launched, self._note = launched, note
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._roll = RollCall(self.rank, self.world_size)
        self._log = log
        self._beat = _Beat("the start", None)
        self._steps = self._timeout
        """What steps are held to by now."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="plait-watchdog", daemon=True)

    def beat(self, label: str, limit: Limit | None = None) -> None:
        """Progress was made.

        Args:
            label: says up to where.
            limit: holds until the next beat, besides the timeout: what comes is a step.
        """
        if limit is not None:
            self._steps = self._shorter(limit)
        self._beat = _Beat(label, limit)

    def __enter__(self) -> Self:
        self._file = self._log.open("a", encoding="utf-8")
        self._enabled = not faulthandler.is_enabled()
        if self._enabled:
            faulthandler.enable(self._file)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._enabled:
            faulthandler.disable()
        self._file.close()

    def _watch(self) -> None:
        parent = os.getppid()
        seen, silence, last = self._beat, 0.0, time.monotonic()
        excused = False
        while True:
            limit = self._shorter(seen.limit)
            tick = min(1.0, limit.seconds / 10)
            self._arm(limit.seconds + 2 * tick)
            if self._ended.wait(tick):
                return
            now = time.monotonic()
            # A process that was stopped, as by Ctrl-Z, was not silent for all that time.
            silence, last = silence + min(now - last, 2 * tick), now
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
                self._write("the launcher of this rank is gone, and so this rank ends")
                os._exit(1)
            if self._beat is not seen:
                seen, silence = self._beat, 0.0
                if excused:
                    self._roll.excuse(-1)
                    excused = False
                continue
            if silence > self._steps.seconds / 2:
                if seen.limit is None and self._steps is not self._timeout and not excused:
                    self._roll.excuse(1)
                    excused = True
                if self._roll.called():
                    self._end_hang(limit)
            if silence > self._timeout.seconds or (silence > limit.seconds and not self._roll.excused()):
                self._end_hang(limit)
            # The store may have been slow to answer.
            asked = time.monotonic()
            silence, last = silence + min(asked - now, 2 * GRACE), asked

    def _shorter(self, limit: Limit | None) -> Limit:
        return self._timeout if limit is None or limit.seconds >= self._timeout.seconds else limit

    def _arm(self, seconds: float) -> None:
        """Put off the end of a rank whose interpreter does not run. A run of one rank may be stopped and
        go on; in one of many the others would not wait."""
        if self.world_size > 1:
            faulthandler.dump_traceback_later(seconds, file=self._file, exit=True)

    def _end_hang(self, limit: Limit) -> None:
        faulthandler.dump_traceback_later(4 * GRACE, file=self._file, exit=True)
        frames = sys._current_frames()
        main = threading.main_thread()
        place = _place(frames[main.ident]) if main.ident in frames else "an ended main thread"
        since = self._beat.label
        message = f"no progress for {limit.words}: in {place} since {since}"
        text = _stacks(frames, self._thread)
        failure = Failure(self.rank, Kind.HANG, message, since=since, place=place, stacks=text)
        failure.record()
        who = f"rank {self.rank}: " if self.world_size > 1 else ""
        if not self.launched:
            tell(f"{text}plait: error: {who}{message}")
        self._write(f"{message}\n{text}")
        if self.world_size > 1:
            self._end_together(failure)
        os._exit(1)

    def _write(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._file.flush()

    def _end_together(self, failure: Failure) -> None:
        """Say where this rank stands, wait for the others to, and tell of all where nobody else does."""
        spoken = self._roll.speak(failure)
        if spoken < 0 and not self.launched:
            line = f"{failure.cause}: {self._roll.keeper} does not answer"
            tell(f"plait: error: {line}")
            # One of each machine: how many hang is not known.
            if self.rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
                self._note(line)
        if spoken < 0:
            return
        self._roll.await_all()
        if self.launched:
            return
        if spoken > 1:
            self._roll.await_told()
            return
        line = hang_line(failure, self._roll.heard() | {self.rank: failure}, self.world_size)
        tell(f"plait: error: {line}")
        self._note(line)
        self._roll.tell()


def _place(frame: FrameType) -> str:
    """The innermost function of this package that a stack is in, else simply the innermost."""
    innermost, inner = frame, frame
    while inner is not None:
        file = Path(inner.f_code.co_filename).resolve()
        if file.is_relative_to(PACKAGE) and "site-packages" not in file.relative_to(PACKAGE).parts:
            name = inner.f_code.co_qualname.removesuffix(".<locals>.<lambda>")
            return f"{name} ({file.relative_to(PACKAGE)}:{inner.f_lineno})"
        inner = inner.f_back
    return f"{innermost.f_code.co_name} ({innermost.f_code.co_filename}:{innermost.f_lineno})"


def _stacks(frames: dict[int, FrameType], watchdog: threading.Thread) -> str:
    main = threading.main_thread()
    threads = [t for t in threading.enumerate() if t.ident in frames and t is not watchdog]
    parts = []
    for thread in sorted(threads, key=lambda t: t is not main):
        stack = "".join(traceback.format_stack(frames[thread.ident or 0]))
        parts.append(f"thread {thread.name}, innermost call last:\n{stack}")
    return "".join(parts)
