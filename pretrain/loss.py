"""The training loss of a micro-batch, as its share of the step's loss.

Every part is a sum divided by a count over the whole step and all ranks, known before the backward,
so that gradients only ever add up: over micro-batches, over ranks, in any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.window import IGNORE
from ..kernels.cross_entropy import linear_cross_entropy
from ..parallel.collectives import all_gather
from ..parallel.fsdp import set_last_micro_batch
from ..parallel.vocabulary import vocabulary_shard
from .model import Hybrid, Packing, Report

__all__ = ["IGNORE", "LossParts", "MicroBatch", "StepCounts", "accumulate_gradients", "compute_loss"]


@dataclass(frozen=True)
class MicroBatch:
    """Tensors (B, L) on the model's device: this rank's sequences and tokens, the same on all ranks of tp."""

    tokens: Tensor
    targets: Tensor
    packing: Packing


@dataclass(frozen=True)
class StepCounts:
    """What the sums of a step are divided by, over all its micro-batches and ranks."""

    targets: int
    tokens: int
    sequences: int


@dataclass
class LossParts:
    """This rank's shares; the ranks of tp, which have the same tokens, all have the cross entropy's."""

    total: Tensor
    """Differentiable; its gradients are this micro-batch's share of the step's."""
    cross_entropy: Tensor
    """Detached share of the mean over targets, in nats."""
    extra: dict[str, Tensor]
    """Detached shares of the other losses, coefficients included."""
    reports: list[Report]
    """What each layer gave beside its output."""


def accumulate_gradients(
    model: Hybrid,
    micro_batches: Sequence[MicroBatch],
    counts: StepCounts,
    *,
    dtype: torch.dtype,
    z_loss: float = 0.0,
) -> list[LossParts]:
    """Run the model forward and backward on a step's micro-batches, whose gradients add up.

    What every rank of tp holds is left incomplete: see `plait.parallel.placements`.
    """
    parts = []
    for micro in micro_batches:
        set_last_micro_batch(model, micro is micro_batches[-1])
        part = compute_loss(model, micro, counts, dtype=dtype, z_loss=z_loss)
        part.total.backward()
        parts.append(part)
    return parts


def compute_loss(
    model: Hybrid,
    batch: MicroBatch,
    counts: StepCounts,
    *,
    dtype: torch.dtype,
    z_loss: float = 0.0,
) -> LossParts:
    """Run the model on a micro-batch.

    A step without a single target has loss zero and gradients of zero.
    """
    hidden_BLD, reports = model(batch.tokens, batch.packing, dtype)
    total, cross_entropy = linear_cross_entropy(
        all_gather(hidden_BLD, model.mesh.tp, dim=1).flatten(0, 1),
        model.head_weight,
        batch.targets.flatten(),
        z_loss=z_loss,
        shard=vocabulary_shard(model.mesh, model.config.vocab_size),
    )
    targets = max(1, counts.targets)
    total = total / targets
    # The balance loss is a mean over sequences, the router's z-loss one over tokens.
    divisors = {"aux_loss": counts.sequences, "router_z_loss": counts.tokens}
    extra = {}
    if z_loss:
        extra["z_loss"] = total.detach() - cross_entropy / targets
    for report in reports:
        for name, value in report.losses.items():
            share = value / divisors[name]
            total = total + share
            extra[name] = extra.get(name, 0.0) + share.detach()
    return LossParts(total, cross_entropy / targets, extra, reports)
