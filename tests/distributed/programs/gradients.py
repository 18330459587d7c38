"""The gradients of a first step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from plait.parallel.placements import gradient_norm, local, part, sum_replicated_gradients
from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import accumulate_gradients
from plait.pretrain.model import Hybrid
from plait.pretrain.step_sums import sum_parts
from plait.pretrain.trainer import Trainer

Part = tuple[tuple[slice, ...], Tensor]
"""Where this rank's part lies in the whole, and the part."""


def run(
    tree: dict[str, Any], masked: Sequence[list[int]] = (), favoured: Sequence[int] = ()
) -> dict[str, Any]:
    """Loss, gradient norm, number of targets, this rank's own number of them, its gradients, and the
    tokens that each expert got over all ranks.

    Args:
        masked: [row, end, token, end] of the batch: those are no targets.
        favoured: experts that every token chooses before others.
    """
    trainer = Trainer(parse_config(tree, "test"))
    config, model, mesh = trainer.config, trainer.state.model, trainer.mesh
    for router in model.routers:
        router.correction_bias[list(favoured)] += 100.0
    with trainer._loader() as loader:
        batch, _ = loader.next()
    rows = range(config.train.batch_size)[mesh.rows(config.train.batch_size)]
    first, _ = mesh.tokens(config.data.seq_len)
    for row, last_row, token, end in masked:
        for index, number in enumerate(rows):
            if row <= number < last_row:
                batch["targets"][index, max(0, token - first) : max(0, end - first)] = -100
    counts = trainer._count(batch)
    micro_batches = trainer.micro_batches(batch)
    parts = accumulate_gradients(
        model, micro_batches, counts, dtype=trainer.dtype, z_loss=config.train.z_loss
    )
    sum_replicated_gradients(model.parameters(), mesh)
    return {
        "loss": sum_parts(parts, mesh).loss,
        "norm": float(gradient_norm(model.parameters(), mesh)),
        "targets": counts.targets,
        "own_targets": int((batch["targets"] != -100).sum()),
        "micro_batches": len(micro_batches),
        "gradients": gradients(model),
        "counts": [counts.tolist() for counts in sum_parts(parts, mesh).counts],
    }


def gradients(model: Hybrid) -> dict[str, Part]:
    """This rank's part of every parameter's gradient."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = part(parameter), local(parameter.grad).detach().clone()
    return found
