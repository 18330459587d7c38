"""Steps of a run in which one rank has half the speed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from plait.pretrain.callbacks import Callback, Stragglers
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

MOMENT = 0.005
"""Seconds that the slow rank is stopped, and then runs, in turn: a step takes several times that."""


class _Records(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)


def run(tree: dict[str, Any], slow: int) -> dict[str, Any]:
    """The metrics of the steps, and the run's log."""
    records = _Records()
    trainer = Trainer(parse_config(tree, "test"), [records, Stragglers()])
    with _half_the_speed() if trainer.mesh.rank == slow else nullcontext():
        trainer.run()
    log = Path(trainer.folder.path) / "run.log"
    return {"steps": records.steps, "log": log.read_text() if trainer.mesh.rank == 0 else ""}


@contextmanager
def _half_the_speed() -> Iterator[None]:
    """Another process stops this one half of the time."""
    rank = os.getpid()
    other = os.fork()
    if other == 0:
        # It ends with the rank, also where that is killed.
        while os.getppid() == rank:
            os.kill(rank, signal.SIGSTOP)
            time.sleep(MOMENT)
            os.kill(rank, signal.SIGCONT)
            time.sleep(MOMENT)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.kill(rank, signal.SIGCONT)
