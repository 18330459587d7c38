"""Steps of a run in which one rank's layers take several times their time."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from plait.parallel.waits import Waits
from plait.pretrain.callbacks import Callback, Stragglers
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

TIMES = 10.0
"""Of a layer's own forward, that it sleeps: with the backward and the rest, a step's work takes more than
twice as long also where other processes share the cores."""


class _Records(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)


def run(tree: dict[str, Any], slow: int) -> dict[str, Any]:
    """The metrics of the steps, and the run's log."""
    records = _Records()
    trainer = Trainer(parse_config(tree, "test"), [records, Stragglers()])
    if trainer.mesh.rank == slow:
        for layer in trainer.state.model.layers:
            _slow_down(layer, trainer.mesh.waits)
    trainer.run()
    log = Path(trainer.folder.path) / "run.log"
    return {"steps": records.steps, "log": log.read_text() if trainer.mesh.rank == 0 else ""}


def _slow_down(layer: nn.Module, waits: Waits) -> None:
    began = [0.0]

    def own_time() -> float:
        return time.perf_counter() - (waits.seconds() or 0.0)

    def before(*_: Any) -> None:
        began[0] = own_time()

    def after(*_: Any) -> None:
        time.sleep(TIMES * (own_time() - began[0]))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
