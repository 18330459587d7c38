"""The watchdog: a rank that makes no progress says where it stands, and ends the run."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from .failures import Failure, Kind, tell

__all__ = ["Watchdog"]

GRACE = 3.0
"""Seconds that a rank which hangs gives the others to say where they stand."""

PACKAGE = Path(__file__).resolve().parent.parent


class Watchdog:
    """Ends this process when nothing calls :meth:`beat` for `timeout` seconds.

    In a hang all ranks fall silent, so each would speak for itself; the first to do so calls on the
    others through the ranks' store, and they answer if they are silent too. Each writes the stacks of
    all its threads into its log and a :class:`Failure` for its launcher (where that is not `plait
    launch`, also to standard error), waits a little for the others, and exits with 1. A rank whose
    interpreter does not run at all is ended by a timer that needs none.

    Use it in a ``with`` block; it watches as long as that lasts.

    Args:
        timeout: seconds.
        log: the rank's log file.
        launched: `plait launch` started this rank, and tells what is to be told.
    """

    def __init__(self, timeout: float, log: Path, *, launched: bool = False) -> None:
        self.timeout, self.launched = timeout, launched
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._log = log
        self._store: dist.TCPStore | None = None
        self._beats, self._label = 0, "the start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="plait-watchdog", daemon=True)

    def beat(self, label: str) -> None:
        """Progress was made; `label` says up to where."""
        self._label = label
        self._beats += 1

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
        tick = min(1.0, self.timeout / 10)
        parent = os.getppid()
        seen, silence, last = self._beats, 0.0, time.monotonic()
        self._arm(tick)
        while not self._ended.wait(tick):
            self._arm(tick)
            now = time.monotonic()
            # A process that was stopped, as by Ctrl-Z, was not silent for all that time.
            silence, last = silence + min(now - last, 2 * tick), now
            if self._beats != seen:
                seen, silence = self._beats, 0.0
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
                self._write("the launcher of this rank is gone, and so this rank ends")
                os._exit(1)
            if silence > self.timeout or (silence > self.timeout / 2 and self._is_called()):
                self._end_hang()

    def _arm(self, tick: float) -> None:
        """Put off the end of a rank whose interpreter does not run. A run of one rank may be stopped and
        go on; in one of many the others would not wait."""
        if self.world_size > 1:
            faulthandler.dump_traceback_later(self.timeout + 2 * tick, file=self._file, exit=True)

    def _end_hang(self) -> None:
        faulthandler.dump_traceback_later(2 * GRACE, file=self._file, exit=True)
        frames = sys._current_frames()
        main = threading.main_thread()
        place = _place(frames[main.ident]) if main.ident in frames else "an ended main thread"
        since = self._label
        message = f"no progress for {self.timeout:g} s: in {place} since {since}"
        text = _stacks(frames, self._thread)
        Failure(self.rank, Kind.HANG, message, since=since, place=place, stacks=text).record()
        who = f"rank {self.rank}: " if self.world_size > 1 else ""
        if not self.launched:
            tell(f"{text}plait: error: {who}{message}")
        self._write(f"{message}\n{text}")
        self._await_others()
        os._exit(1)

    def _write(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._file.flush()

    def _is_called(self) -> bool:
        return self._count(0) > 0

    def _await_others(self) -> None:
        """Say in the store that this rank has spoken; wait for all others to, but not for long."""
        deadline = time.monotonic() + GRACE
        spoken = self._count(1)
        while 0 < spoken < self.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
            spoken = self._count(0)

    def _count(self, more: int) -> int:
        """How many ranks have spoken, this one's `more` among them; -1 where no store can be reached."""
        if self.world_size == 1:
            return -1
        try:
            # A client of its own: the process group's may be held by the call that hangs.
            self._store = self._store or dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=GRACE),
            )
            life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return self._store.add(f"plait/hang/{life}", more)
        except (KeyError, RuntimeError):
            return -1


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
