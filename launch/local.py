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


def launch_ranks(command: list[str], ranks: int, log_folder: Path) -> int:
    """Run `command` in as many processes, with torchrun's environment, until all or one of them end.

    A rank that fails ends all; the last line on standard error then names it and its error. Ctrl-C and
    SIGTERM end all ranks.

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

    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
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
                signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
            ),
            "/bin/sh",
        )
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            with _waking_the_stopped(Path(private), interrupted):
                launch("-c", SCRIPT, str(log_folder), *command)
            return 0
        except ChildFailedError as failed:
            line, status = verdict(failed.failures, ranks)
            tell(f"{stacks(failed.failures)}plait: error: {line}")
            return status
        except SignalException as caught:
            number = signal.SIGINT if interrupted.is_set() else caught.sigval
            tell(f"plait: ended by {signal.Signals(number).name}; the same command goes on")
            return 128 + number
        finally:
            signal.signal(signal.SIGINT, before)


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
def _waking_the_stopped(private: Path, interrupted: threading.Event) -> Iterator[None]:
    """Once a rank is gone, wake those that were stopped, so that the signal to end reaches them."""
    over = threading.Event()

    def wake() -> None:
        while not over.wait(POLL_SECONDS):
            pids = [int(text) for file in private.rglob("pid") if (text := file.read_text())]
            if interrupted.is_set() or not all(_lives(pid) for pid in pids):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=wake, name="plait-wake", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
