"""Two ledgers of the same forward and backward, with one between them that nobody records."""

from typing import Any

from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import compute_loss
from plait.pretrain.trainer import Trainer


def run(tree: dict[str, Any]) -> list[list[tuple[str, str, int, int]]]:
    """Axis, kind, bytes and place of every collective, for each ledger."""
    trainer = Trainer(parse_config(tree, "test"))
    with trainer._loader() as loader:
        batch, _ = loader.next()
    counts = trainer._count(batch)
    found = []

    def once() -> None:
        for micro in trainer.micro_batches(batch):
            compute_loss(trainer.state.model, micro, counts, dtype=trainer.dtype).total.backward()

    for recorded in (True, False, True):
        if not recorded:
            once()
            continue
        with trainer.mesh.record() as ledger:
            once()
        found.append([(e.axis, e.kind, e.sent, e.launched) for e in ledger.entries])
    return found
