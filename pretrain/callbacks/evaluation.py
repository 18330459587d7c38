"""Loss on held-out documents."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..evaluation import evaluate
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Evaluation"]


class Evaluation(Callback):
    """Adds `validation_loss`, the mean over targets in nats, to the metrics of its steps.

    It reads the same windows every time: those of the first `evaluate.batches` batches of one epoch of
    the held-out shards in an order of their own, or the whole of them where they are fewer.

    Args:
        beat: is told of each batch, for a watchdog: an evaluation may last longer than it is patient.
    """

    def __init__(self, beat: Callable[[str], None] | None = None) -> None:
        self._beat = beat

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        config = trainer.config
        due = metrics["step"] % config.evaluate.every == 0 or metrics["step"] == config.train.steps
        if config.data.validation is not None and due:
            measured = evaluate(
                trainer.state.model,
                config.data.validation,
                seq_len=config.data.seq_len,
                windows=config.evaluate.batches * config.train.batch_size,
                batch_size=config.train.micro_batch_size or config.train.batch_size,
                isolate_documents=config.data.isolate_documents,
                dtype=trainer.dtype,
                progress=self._tell,
            )
            metrics["validation_loss"] = measured.loss

    def _tell(self, windows: int) -> None:
        if self._beat is not None:
            self._beat(f"{windows} windows of an evaluation")
