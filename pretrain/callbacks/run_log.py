"""The run's life in `run.log`: its start, evaluations, and what asked it to stop."""

import os
import socket
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...errors import few
from ...parallel.axes import describe_layout
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["RunLog"]

MOST_CHANGES = 8
"""Keys that the line of a start names."""


class RunLog(Callback):
    """Checkpoints are told of by `checkpointing.py`, the end by the trainer, errors by the command."""

    def start(self, trainer: "Trainer") -> None:
        state, mesh = trainer.state, trainer.mesh
        if trainer.resumed_from is not None:
            origin = f"resumed from the checkpoint of step {trainer.resumed_from}"
        elif trainer.begun_from is not None:
            origin = f"new, with the weights of {trainer.begun_from}"
        else:
            origin = f"new, from seed {trainer.config.run.seed}"
        ranks = (
            f"{mesh.world_size} ranks ({describe_layout(mesh.sizes)})" if mesh.world_size > 1 else "one rank"
        )
        last = trainer.last_step
        steps = f"steps {state.step} to {last}" if last > state.step else "no step is left"
        trainer.say(
            f"started: {origin}; {steps}; {ranks} on "
            f"{trainer.device.type}, rank 0 is process {os.getpid()} on {socket.gethostname()}; "
            f"plait {__version__}, torch {torch.__version__}"
        )
        if trainer.changes:
            changes = [f"{key} = {now}, was {then}" for key, (then, now) in trainer.changes.items()]
            trainer.say(f"changed since the checkpoint: {few(changes, MOST_CHANGES)}")

    def stage(self, trainer: "Trainer", changes: dict[str, tuple[Any, Any]]) -> None:
        shown = few([f"{key} = {now}, was {before}" for key, (before, now) in changes.items()], MOST_CHANGES)
        which = f"stage {trainer.stage} of {len(trainer.config.stages)}"
        trainer.say(f"{which} from step {trainer.state.step + 1}: {shown}")

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if (loss := metrics.get("validation_loss")) is not None:
            trainer.say(f"evaluated: step {metrics['step']}, validation loss {loss:.4f}")
        if trainer.stopping.reason is not None:
            trainer.say(f"stopping: {trainer.stopping.reason}")
