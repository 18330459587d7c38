"""Some steps of training."""

from typing import Any

from plait.pretrain.callbacks import Evaluation
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer


def run(tree: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The metrics of each step, and in the last a validation loss."""
    trainer = Trainer(parse_config(tree, "test"))
    records = []
    with trainer._loader() as loader:
        for _ in range(steps):
            batch, _ = loader.next()
            records.append(trainer.train_step(batch))
    last = records[-1] | {"step": trainer.config.train.steps}
    Evaluation().step(trainer, last)
    records[-1]["validation_loss"] = last["validation_loss"]
    return records
