"""Many ranks on this machine: started, watched and ended together, by torch's elastic launcher.

Rank 0 has the terminal. What another rank prints is appended to `rank-NNNNN.out` in the log folder, and
what the launcher itself notes to `launch.log` there.
"""

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from .rank_process import LAUNCHED

__all__ = ["launch_ranks"]

# The launcher's own redirection would overwrite the file at each start, and splits the two streams.
SCRIPT = 'test "$RANK" = 0 || exec >>"$0/$(printf rank-%05d.out "$RANK")" 2>&1; exec "$@"'

POLL_SECONDS = 0.5

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals of which the first asks the ranks to stop."""


def launch_ranks(command: list[str], ranks: int, log_folder: Path) -> int:
    """Run `command` in as many processes, with torchrun's environment, until all or one of them end.

    A rank that fails ends all; the last line on standard error then names it and its error. The first Ctrl-C,
    SIGTERM or SIGUSR1 asks all ranks to stop when they can, the second ends them.

    Args:
        command: runs :func:`plait.launch.rank_process.run_as_rank`.
        log_folder: exists.

    Returns:
        the exit status: 0, 2 where a rank met a `UserError`, 1 for any other failure, 128 and the
        signal's number where one ended the run.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ..parallel.failures import stacks, tell, verdict

    asked, ended = threading.Event(), threading.Event()
    last = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if not asked.is_set():
            asked.set()
            if number == signal.SIGINT:
                tell("plait: stopping after this step, with a checkpoint; Ctrl-C again ends at once")
            return
        last = signal.Signals(number)
        ended.set()
        for one in POLITE:
            signal.signal(one, signal.SIG_IGN)
        # The ranks are sent what this names; SIGTERM ends also one that is still importing.
        raise SignalException("interrupted", signal.SIGTERM)

    os.environ[LAUNCHED] = "1"
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with TemporaryDirectory(prefix="plait-") as private, _noted_in(log_folder / "launch.log"):
        launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=str(uuid.uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=private),
                signals_to_handle="SIGHUP,SIGQUIT",
            ),
            "/bin/sh",
        )
        before = {number: signal.signal(number, interrupt) for number in POLITE}
        try:
            with _reaching_the_ranks(Path(private), asked, ended):
                launch("-c", SCRIPT, str(log_folder), *command)
            return 0
        except ChildFailedError as failed:
            line, status = verdict(failed.failures, ranks)
            tell(f"{stacks(failed.failures)}plait: error: {line}")
            return status
        except SignalException as caught:
            number = last if ended.is_set() else caught.sigval
            tell(f"plait: ended by {signal.Signals(number).name}; the same command goes on")
            return 128 + number
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
def _reaching_the_ranks(private: Path, asked: threading.Event, ended: threading.Event) -> Iterator[None]:
    """Once `asked`, ask every rank to stop, when it can hear of it. Once a rank is gone, or `ended`, wake
    those that Ctrl-Z has stopped, so that the signal to end reaches them."""
    over = threading.Event()
    told: set[int] = set()

    def reach() -> None:
        while not over.wait(POLL_SECONDS):
            pids = [int(text) for file in private.rglob("pid") if (text := file.read_text())]
            if ended.is_set() or not all(_lives(pid) for pid in pids):
                for pid in pids:
                    _send(pid, signal.SIGCONT)
            if asked.is_set() and not ended.is_set():
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
