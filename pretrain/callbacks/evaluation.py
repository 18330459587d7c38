"""Loss on held-out documents."""

from typing import TYPE_CHECKING, Any

import torch

from ...data.loader import Loader
from ...data.mixture import Plan, open_blend
from ...data.window import IGNORE
from ..loss import StepCounts, compute_loss
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Evaluation"]


class Evaluation(Callback):
    """Adds `validation_loss`, the mean over targets in nats, to the metrics of its steps.

    It reads the same windows every time: the first `evaluate.batches` batches of one epoch of the
    held-out shards in an order of their own, or the whole of them where they are fewer.
    """

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        config = trainer.config
        due = metrics["step"] % config.evaluate.every == 0 or metrics["step"] == config.train.steps
        if config.data.validation is not None and due:
            metrics["validation_loss"] = evaluate(trainer, config.data.validation)


@torch.no_grad()
def evaluate(trainer: "Trainer", prefix: str) -> float:
    """Mean cross-entropy over the targets of held-out shards, in nats."""
    config = trainer.config
    sources, shards = open_blend({prefix: 1.0})
    plan = Plan.start(sources, seed=0, seq_len=config.data.seq_len)
    windows = max(1, (shards[prefix].num_tokens - 1) // config.data.seq_len - 1)
    wanted = config.evaluate.batches * config.train.batch_size
    size = min(config.train.micro_batch_size or config.train.batch_size, windows)
    total, targets = 0.0, 0
    one = StepCounts(targets=1, tokens=1, sequences=1)
    with Loader(
        plan, shards, cursor=0, batch_size=size, isolate_documents=config.data.isolate_documents
    ) as loader:
        for _ in range(max(1, min(windows, wanted) // size)):
            batch, _ = loader.next()
            micro = trainer.micro_batch(batch, slice(None))
            parts = compute_loss(trainer.state.model, micro, one, dtype=trainer.dtype)
            total += float(parts.cross_entropy)
            targets += int((batch["targets"] != IGNORE).sum())
    return total / max(1, targets)
