"""A run, with its checkpoints."""

from typing import Any

from plait.parallel.placements import local, part
from plait.pretrain.callbacks import Callback, Checkpointing, Evaluation
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

CLOCKS = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")


class _Records(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.steps.append({key: value for key, value in metrics.items() if key not in CLOCKS})


def run(tree: dict[str, Any]) -> dict[str, Any]:
    """Where it was taken up, its steps' metrics, and this rank's part of the parameters at the end."""
    records = _Records()
    trainer = Trainer(parse_config(tree, "test"), [Evaluation(), records, Checkpointing()])
    resumed_from = trainer.resumed_from
    trainer.run()
    return {
        "resumed_from": resumed_from,
        "steps": records.steps,
        "parts": {
            name: (part(p), local(p).detach().clone()) for name, p in trainer.state.model.named_parameters()
        },
    }
