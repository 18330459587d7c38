"""A run with its checkpoints, and what it holds when it begins and at each of them."""

from typing import Any

import torch

from plait.parallel.placements import local, part
from plait.pretrain.callbacks import Callback, Checkpointing, Evaluation
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

CLOCKS = ("tokens_per_second", "step_seconds", "data_seconds", "mfu") + (
    "slowest_rank",
    "slowest_share",
    "stragglers",
    "straggler_places",
)


class _Records(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.drawn: list[float] = []
        self.states: dict[int, dict[str, Any]] = {}

    def start(self, trainer: Trainer) -> None:
        self._keep(trainer)

    def step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.steps.append({key: value for key, value in metrics.items() if key not in CLOCKS})
        # Nothing in a step draws from torch's generator; a checkpoint holds it for whoever does.
        self.drawn.append(float(torch.rand(())))
        if trainer.state.step % trainer.config.checkpoint.every == 0:
            self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        self.states[trainer.state.step] = state_of(trainer)


def run(tree: dict[str, Any], seed: int, train: bool = True) -> dict[str, Any]:
    """Where it was taken up, its steps' metrics, what was drawn at each, and its states by step.

    Args:
        seed: of torch's generator, which a checkpoint replaces.
        train: else it is made and not trained.
    """
    torch.manual_seed(seed)
    records = _Records()
    trainer = Trainer(parse_config(tree, "test"), [Evaluation(), records, Checkpointing()])
    found = {"resumed_from": trainer.resumed_from, "states": records.states}
    if train:
        trainer.run()
    else:
        records.start(trainer)
        trainer.close()
    return found | {"steps": records.steps, "drawn": records.drawn}


def state_of(trainer: Trainer) -> dict[str, Any]:
    """This rank's part of every tensor that a checkpoint holds, and the place in the data."""
    state = trainer.state
    return {
        "parts": {name: (part(t), local(t).detach().clone()) for name, t in state.tensors().items()},
        "place": [state.step, state.samples, state.tokens, state.plan.fingerprint],
    }
