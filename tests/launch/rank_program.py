"""Ranks that add numbers, and fail, hang or die on demand; started by :func:`launch_ranks`.

`rank_program.py launch DEED RANKS FOLDER RESTARTS` launches, `rank_program.py rank DEED FOLDER` is a rank.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from plait.errors import UserError
from plait.launch.local import launch_ranks
from plait.launch.rank_process import is_launched, life, log_to, rank, run_as_rank
from plait.parallel.pace import Limit
from plait.parallel.processes import start_processes, stop_processes
from plait.parallel.watchdog import Watchdog

LAST = 3
CULPRIT = 1

LONG, SHORT = 60.0, 3.0
"""Timeouts: where nothing should hang, and where something does."""

STEP = Limit(SHORT, "3 s, 20 times the median step of 0.15 s")
"""What a step may take where the timeout is long."""


def main(deed: str, folder: Path) -> None:
    log = folder / f"rank-{rank():05d}.log"
    log_to(log)
    timeout = SHORT if deed in ("hang", "deaf") else LONG
    # Who comes late to the meeting on a busy machine does not hang.
    start_processes(torch.device("cpu"), LONG)
    with Watchdog(timeout, log, launched=is_launched()) as watchdog:
        print(f"rank {rank()} with {torch.get_num_threads()} threads", flush=True)
        for step in range(1, LAST + 1):
            if step == LAST and deed != "succeed":
                DEEDS[deed]()
            add_up(step)
            watchdog.beat(f"step {step}", STEP if deed in ("stall", "late") else None)
            if deed == "late" and rank() == 0 and step == 1:
                watchdog.beat("a slow disk")
                time.sleep(2 * SHORT)
        stop_processes()
    if rank() == 0:
        print("finished", flush=True)


def add_up(step: int) -> None:
    total = torch.full((3,), float(step))
    if dist.is_initialized():
        dist.all_reduce(total)
        assert total[0] == step * dist.get_world_size()


def fail() -> None:
    if rank() == CULPRIT:
        raise ValueError("the data\nis odd")


def mistake() -> None:
    raise UserError("data.blend = x: no such file; name another")


def hang() -> None:
    if rank() == CULPRIT:
        sleep_forever()


def stall() -> None:
    if rank() == 0:
        sleep_forever()


def late() -> None:
    """The first rank is, between its steps, longer than a step may take; the others wait for it in theirs."""


def sleep_forever() -> None:
    while True:
        time.sleep(60)


def die() -> None:
    if rank() == CULPRIT:
        os.kill(os.getpid(), signal.SIGKILL)


def die_once() -> None:
    if life() == 0:
        die()


def deaf() -> None:
    """One rank never lets another thread of its interpreter run, another one is stopped."""
    if rank() == CULPRIT:
        ctypes.PyDLL(None).sleep(60)
    if rank() == CULPRIT + 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def wait() -> None:
    if rank() == 0:
        print("waiting", flush=True)
    sleep_forever()


DEEDS = {f.__name__: f for f in (fail, mistake, hang, stall, late, die, die_once, deaf, wait)}

if __name__ == "__main__":
    mode, deed, *rest = sys.argv[1:]
    if mode == "launch":
        folder = Path(rest[1])
        command = [sys.executable, __file__, "rank", deed, str(folder)]
        sys.exit(launch_ranks(command, int(rest[0]), folder, folder / "checkpoints", int(rest[2])))
    run_as_rank(lambda signals: main(deed, Path(rest[0])))
