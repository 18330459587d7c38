"""A rank's process: its log, its last words, its end."""

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .stop_signals import StopSignals

__all__ = [
    "LAUNCHED",
    "LIFE",
    "STOPPED",
    "is_launched",
    "life",
    "log_to",
    "logger",
    "rank",
    "run_as_rank",
    "seconds_since_launch",
]

LAUNCHED = "PLAIT_LAUNCHED"
"""Set in the environment of ranks whose launcher tells of their failures: when it was started, in seconds
since 1970."""

LIFE = "PLAIT_LIFE"
"""In the same environment: how often the launcher has started the ranks before."""

STOPPED = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL, by which schedulers try again."""

LINGER = 1.0
"""Seconds that the first rank of a machine, having failed, stays; the others stay twice as long. Were it
another's fault, that one ends meanwhile and is named; were it everybody's, one rank tells of it."""

logger = logging.getLogger("plait")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def life() -> int:
    """How often `plait launch`, or torchrun, has started the ranks before."""
    return int(os.environ.get(LIFE) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def seconds_since_launch() -> float:
    """How long ago `plait launch` was started; 0 where it did not start this process."""
    return time.time() - float(os.environ[LAUNCHED]) if is_launched() else 0.0


def is_launched() -> bool:
    """Whether `plait launch` started this process."""
    return LAUNCHED in os.environ


class _LastingLog(logging.handlers.WatchedFileHandler):
    """A log whose folder may go away and come back; meanwhile it is silent, and the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        # What is not written here stands, where it matters, on the terminal.
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(file: Path) -> None:
    """Send the log to a file, and the first rank's warnings to the terminal too."""
    record = _LastingLog(file, encoding="utf-8")
    record.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.setLevel(logging.INFO)
    logger.handlers = [record]
    if rank() == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("plait: %(message)s"))
        # A traceback is for the file; the terminal gets the one line that is made of it.
        terminal.addFilter(lambda entry: not entry.exc_info)
        logger.handlers.append(terminal)


def run_as_rank(body: Callable[[StopSignals], None]) -> None:
    """Run what a rank does, given the signals that ask it to stop. Where torchrun or `plait launch` started
    this process, end it then.

    An error that escapes is told in one line that names the rank, by the rank or by its launcher; a
    traceback goes into the rank's log. The exit status is 2 for a `UserError`, else 1.
    """
    signals = StopSignals(launched=is_launched())
    if "RANK" not in os.environ:
        body(signals)
        return
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).with_name("pid").write_text(str(os.getpid()))
    status = 0
    try:
        body(signals)
    except BaseException as error:
        status = _fail(error)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreters that took part in collectives sometimes abort while they are torn down.
    os._exit(status)


def _fail(error: BaseException) -> int:
    from ..errors import UserError
    from ..parallel.failures import failure_of, tell

    failure, meant = failure_of(error, rank())
    if not isinstance(meant, UserError):
        logger.error("this rank ended", exc_info=error)
        if file := next((h for h in logger.handlers if isinstance(h, logging.FileHandler)), None):
            path = Path(file.baseFilename)
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            failure = failure.with_hint(f"its traceback is in {shown}")
    failure.record()
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many:
        time.sleep(LINGER if os.environ.get("LOCAL_RANK", "0") == "0" else 2 * LINGER)
    if not is_launched():
        tell(f"plait: error: {f'rank {failure.rank}: ' if many else ''}{failure.message}")
    return failure.status
