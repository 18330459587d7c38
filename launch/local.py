"""Many ranks on this machine: started, watched, ended and started again, by torch's elastic launcher.

Rank 0 has the terminal. What another rank prints is appended to `rank-NNNNN.out` in the log folder, and
what the launcher itself notes to `launch.log` there.
"""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from ..pretrain.run_log import FAILED, note
from .lives import Life
from .rank_process import LAUNCHED, LIFE, STOPPED

__all__ = ["launch_ranks"]

# The launcher's own redirection would overwrite the file at each start, and splits the two streams.
SCRIPT = 'test "$RANK" = 0 || exec >>"$0/$(printf rank-%05d.out "$RANK")" 2>&1; exec "$@"'

POLL_SECONDS = 0.5

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals of which the first asks the ranks to stop."""


def launch_ranks(
    command: list[str], ranks: int, log_folder: Path, checkpoints: Path, max_restarts: int
) -> int:
    """Run `command` in as many processes, with torchrun's environment, until all or one of them end.

    A rank that fails ends all. They are started again unless it met a `UserError`, a signal has asked them
    to stop, or too many lives in a row have left no newer checkpoint; the last line on standard error then
    names the rank and its error. The first Ctrl-C, SIGTERM or SIGUSR1 asks all ranks to stop when they can,
    the second ends them.

    Args:
        command: runs :func:`plait.launch.rank_process.run_as_rank`.
        log_folder: exists.
        checkpoints: the folder in the run's that the ranks save into, and go on from; need not exist.
        max_restarts: lives in a row that may begin anew without a newer checkpoint.

    Returns:
        the exit status: 0, 2 where a rank met a `UserError`, 1 for any other failure, 75 where it was asked
        to stop between two lives, 128 and the signal's number where one ended the run.

    Raises:
        UserError: the folder of checkpoints cannot be listed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    from ..parallel.failures import tell

    run, life = checkpoints.parent, Life.first(checkpoints)
    stops = _Stops()
    os.environ[LAUNCHED], os.environ[LIFE] = str(time.time()), "0"
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with _noted_in(log_folder / "launch.log"), stops:
        try:
            while (failure := _live(command, ranks, log_folder, stops)) is not None:
                stacks, line, status = failure
                life = life.following(checkpoints)
                if status != 2 and life.restarts > max_restarts > 0:
                    times = f"{max_restarts} restart{'s' if max_restarts > 1 else ''}"
                    line = f"no progress beyond {life.place} after {times}; the last time: {line}"
                if status == 2 or stops.asked.is_set() or life.restarts > max_restarts:
                    note(run, FAILED + line)
                    tell(f"{stacks}plait: error: {line}")
                    return status
                os.environ[LIFE] = str(int(os.environ[LIFE]) + 1)
                line = f"{line}; going on from {life.place} (restart {life.restarts} of {max_restarts})"
                note(run, line)
                tell(f"{stacks}plait: {line}")
                if stops.asked.is_set():
                    tell("plait: stopped before that; the same command goes on")
                    return STOPPED
            return 0
        except SignalException as caught:
            number = stops.last if stops.ended.is_set() else caught.sigval
            line = f"ended by {signal.Signals(number).name}"
            note(run, line)
            tell(f"plait: {line}; the same command goes on")
            return 128 + number


class _Stops:
    """Catches the polite signals while it is entered: `asked` by the first, `ended` by the second.

    Attributes:
        last: the signal that ended it.
    """

    def __init__(self) -> None:
        self.asked, self.ended = threading.Event(), threading.Event()
        self.last = signal.SIGINT

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._hear) for number in POLITE}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        from ..parallel.failures import tell

        if not self.asked.is_set():
            self.asked.set()
            if number == signal.SIGINT:
                tell("plait: stopping after this step, with a checkpoint; Ctrl-C again ends at once")
            return
        self.last = signal.Signals(number)
        self.ended.set()
        for one in POLITE:
            signal.signal(one, signal.SIG_IGN)
        # The ranks are sent what this names; SIGTERM ends also one that is still importing.
        raise SignalException("interrupted", signal.SIGTERM)


def _live(command: list[str], ranks: int, log_folder: Path, stops: _Stops) -> tuple[str, str, int] | None:
    """A life of all ranks; none of their processes outlives it.

    Returns:
        None where all ended well; else the stacks of those that hung, which rank failed and of what, and
        the exit status.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ..parallel.failures import stacks, verdict

    with TemporaryDirectory(prefix="plait-") as private, _reaching_the_ranks(Path(private), stops):
        launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=str(uuid.uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                # torch's own restarts would not ask whether the last life led anywhere.
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=private),
                signals_to_handle="SIGHUP,SIGQUIT",
            ),
            "/bin/sh",
        )
        try:
            launch("-c", SCRIPT, str(log_folder), *command)
        except ChildFailedError as failed:
            return stacks(failed.failures), *verdict(failed.failures, ranks)
    return None


@contextmanager
def _noted_in(file: Path) -> Iterator[None]:
    """Send what the elastic launcher logs into a file instead of to the terminal."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("torch.distributed")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        handler.close()


@contextmanager
def _reaching_the_ranks(private: Path, stops: _Stops) -> Iterator[None]:
    """Once asked to stop, ask every rank, when it can hear it. Once a rank is gone, or all are to end, wake
    those that Ctrl-Z has stopped, so that the signal to end reaches them."""
    over = threading.Event()
    told: set[int] = set()

    def reach() -> None:
        while not over.wait(POLL_SECONDS):
            pids = [int(text) for file in private.rglob("pid") if (text := file.read_text())]
            if stops.ended.is_set() or not all(_lives(pid) for pid in pids):
                for pid in pids:
                    _send(pid, signal.SIGCONT)
            if stops.asked.is_set() and not stops.ended.is_set():
                for pid in set(pids) - told:
                    told.add(pid)
                    _send(pid, signal.SIGUSR1)

    thread = threading.Thread(target=reach, name="plait-reach", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
