"""What a step's metrics are made of: sums over its micro-batches and over all ranks, in one message."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.collectives import sum_in_place
from ..parallel.mesh import Mesh
from .loss import LossParts
from .model import Report

__all__ = ["StepSums", "sum_parts"]


@dataclass(frozen=True)
class StepSums:
    loss: float
    """Mean cross entropy over the step's targets, in nats."""
    extra: dict[str, float]
    """The other losses, coefficients included."""
    counts: list[Tensor]
    """Tokens that each expert got, a tensor (E,) for each layer that has experts."""
    entropies: list[float]
    """Sum over tokens of the entropy of the router's scores, in nats, for each layer that has experts."""
    state_squares: list[float]
    """Sum of squares of the SSM states after the sequences' last tokens, for each layer that has them."""
    wishes: list[float]
    """See `Stopping`."""
    works: list[float]
    """See `plait.parallel.stragglers.Works`."""


@torch.no_grad()
def sum_parts(
    parts: Sequence[LossParts], mesh: Mesh, wishes: Sequence[float] = (), works: Sequence[float] = ()
) -> StepSums:
    """Add up what the micro-batches of a step gave on all ranks; every rank gets the same.

    Args:
        wishes, works: numbers of this rank that are added up along.
    """
    names = list(parts[0].extra)
    # The ranks of tp all know the loss of the tokens that they share.
    known = 1.0 if mesh.tp.place == 0 else 0.0
    scalars = [known * _sum([part.cross_entropy for part in parts])]
    for name in names:
        share = _sum([part.extra[name] for part in parts])
        scalars.append(known * share if name == "z_loss" else share)
    counts = _by_layer(parts, lambda report: report.counts_E)
    entropies = _by_layer(parts, lambda report: report.router_entropy)
    squares = _by_layer(parts, lambda report: report.state_square)
    asked = torch.tensor([*wishes, *works], dtype=torch.float64, device=scalars[0].device)
    pieces = [torch.stack(scalars), asked, *counts, *(number[None] for number in [*entropies, *squares])]
    flat = sum_in_place(torch.cat([piece.double() for piece in pieces]), mesh.axes["world"])
    first, asked, *rest = flat.split([piece.numel() for piece in pieces])
    loss, *extra = first.tolist()
    numbers = [float(number) for number in rest[len(counts) :]]
    return StepSums(
        loss,
        dict(zip(names, extra, strict=True)),
        rest[: len(counts)],
        numbers[: len(entropies)],
        numbers[len(entropies) :],
        asked.tolist()[: len(wishes)],
        asked.tolist()[len(wishes) :],
    )


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).sum()


def _by_layer(parts: Sequence[LossParts], of: Callable[[Report], Tensor | None]) -> list[Tensor]:
    """What the layers that have it reported, each summed over the micro-batches."""
    found = [[value for report in part.reports if (value := of(report)) is not None] for part in parts]
    return [torch.stack([value.double() for value in layer]).sum(0) for layer in zip(*found, strict=True)]
