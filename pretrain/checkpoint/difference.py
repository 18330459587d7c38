"""How far two checkpoints are apart, group by group; two tensors at a time are in memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .index import StoredTensor, describe
from .saved import Checkpoint

__all__ = ["Difference", "GroupDifference", "compare", "group_of"]

PIECE = 1 << 20
"""Elements that are widened to float64 at a time."""


@dataclass
class GroupDifference:
    """How the tensors of a group that both checkpoints hold in one shape are apart."""

    tensors: int = 0
    identical: int = 0
    """How many are the same to the bit."""
    farthest: str | None = None
    """The tensor with the largest relative difference; None where all are identical."""
    farthest_relative: float = 0.0
    _difference: float = 0.0
    _norm: float = 0.0

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the first, over the whole group."""
        return _ratio(self._difference, self._norm)

    def add(self, name: str, first: Tensor, second: Tensor) -> None:
        norm = _squares(first, None)
        self.tensors += 1
        self._norm += norm
        if first.dtype == second.dtype and torch.equal(_bits(first), _bits(second)):
            self.identical += 1
            return
        difference = _squares(first, second)
        self._difference += difference
        relative = _ratio(difference, norm)
        if self.farthest is None or not relative <= self.farthest_relative:
            self.farthest, self.farthest_relative = name, relative


@dataclass
class Difference:
    only_first: list[str]
    """Tensors that the second lacks."""
    only_second: list[str]
    reshaped: dict[str, tuple[str, str]]
    """Tensors of another shape or dtype: how each has them. Of another dtype alone, they are compared."""
    groups: dict[str, GroupDifference] = field(default_factory=dict)


def group_of(name: str) -> str:
    """What a tensor belongs to: model, router, rng, carried, or one of the optimizer's kinds."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "optimizer" else first


def compare(first: Checkpoint, second: Checkpoint) -> Difference:
    """
    Raises:
        UserError: a checkpoint is damaged.
    """
    ours, theirs = first.tensors, second.tensors
    said = {name: (describe(ours[name]), describe(theirs[name])) for name in ours if name in theirs}
    difference = Difference(
        [name for name in ours if name not in theirs],
        [name for name in theirs if name not in ours],
        {name: (one, other) for name, (one, other) in said.items() if one != other},
    )
    for name in said:
        if ours[name].shape == theirs[name].shape:
            group = difference.groups.setdefault(group_of(name), GroupDifference())
            group.add(name, _read(first, name, ours), _read(second, name, theirs))
    return difference


def _read(checkpoint: Checkpoint, name: str, index: Mapping[str, StoredTensor]) -> Tensor:
    tensor = torch.empty(index[name].shape, dtype=index[name].dtype)
    checkpoint.load_into({name: tensor}, partial=True)
    return tensor


def _squares(tensor: Tensor, minus: Tensor | None) -> float:
    """The sum of squares of a tensor, or of its difference from another, in float64."""
    flat = tensor.flatten()
    other = None if minus is None else minus.flatten()
    total = 0.0
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to(torch.float64)
        if other is not None:
            piece = piece - other[start : start + PIECE].to(torch.float64)
        total += float(piece.square().sum())
    return total


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _ratio(difference: float, norm: float) -> float:
    if norm:
        return math.sqrt(difference / norm)
    return math.inf if difference else 0.0
