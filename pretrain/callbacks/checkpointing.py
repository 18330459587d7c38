"""Checkpoints at their interval, at the last step, and at the end whatever it was."""

import logging
from typing import TYPE_CHECKING, Any

from ..checkpoint import CheckpointError
from ..readable import readable_size
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Checkpointing"]

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """A save that fails is reported at the next step and tried again at the next interval; only at the
    last step is it an error, since then nobody would try again."""

    def start(self, trainer: "Trainer") -> None:
        def say(step: int, size: int, seconds: float) -> None:
            trainer.say(f"checkpoint saved: step {step}, {readable_size(size)} in {seconds:.1f} s")

        trainer.checkpoints.saved = say
        trainer.checkpoints.prepare(trainer.state.tensors())

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        step, last = metrics["step"], metrics["step"] == trainer.last_step
        if step % trainer.config.checkpoint.every and not last:
            if refusal := trainer.checkpoints.refusal():
                _warn(trainer, refusal)
            return
        try:
            trainer.checkpoints.wait()
        except CheckpointError as error:
            _warn(trainer, error)
        try:
            state = trainer.state
            trainer.checkpoints.save(step, state.tensors(), state.facts(trainer.config))
        except CheckpointError as error:
            if last:
                raise
            _warn(trainer, error)

    def end(self, trainer: "Trainer") -> None:
        # A save is the work of all ranks, and one that failed would wait for others that wait for it.
        if not (trainer.failed and trainer.mesh.world_size > 1):
            trainer.checkpoints.wait()


def _warn(trainer: "Trainer", refusal: CheckpointError) -> None:
    logger.warning("%s", refusal)
    trainer.say(f"checkpoint not saved: {refusal}")
