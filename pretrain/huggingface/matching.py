"""Where in a folder each tensor of the table lies, whichever way its writer spelt the names.

NVIDIA's files and transformers' `save_pretrained` say `backbone.…` and hold one tensor an expert;
transformers' own state dict says `model.…` and stacks the experts of a layer in one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from .folder import HeldTensor
from .names import FileTensor

__all__ = ["Matching", "Place", "match"]

TRUNKS = ("backbone.", "model.")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What widens to fp32 exactly."""


@dataclass(frozen=True)
class Place:
    """A tensor of the table in the folder."""

    held: HeldTensor
    expert: int | None
    """The slice, where the folder stacks the experts; None is the whole tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape if self.expert is None else self.held.shape[1:]


@dataclass(frozen=True)
class Matching:
    places: dict[str, Place]
    """By the table's name."""
    missing: list[str]
    """Names of the table that the folder has no tensor for."""
    unknown: list[str]
    """Tensors of the folder that the table has no place for, by the folder's names."""

    def read(self, name: str, held: Callable[[str], Tensor]) -> Tensor:
        """A tensor by the table's name, in the dtype it has there.

        Args:
            held: reads one by the folder's name.
        """
        place = self.places[name]
        tensor = held(place.held.name)
        return tensor if place.expert is None else tensor[place.expert]


def match(entries: Sequence[FileTensor], tensors: Mapping[str, HeldTensor], folder: Path) -> Matching:
    """Find the place of each entry.

    Raises:
        UserError: a tensor is there twice, in another shape, or in a dtype that fp32 does not hold.
    """
    places: dict[str, Place] = {}
    for entry in entries:
        found = [(name, expert) for name, expert in _spellings(entry) if name in tensors]
        if len(found) > 1:
            raise UserError(
                f"{folder}: holds {found[0][0]} and {found[1][0]}, which are one tensor; drop one of the two"
            )
        if found:
            name, expert = found[0]
            places[entry.name] = Place(tensors[name], expert)
            _check(entry, places[entry.name])
    taken = {place.held.name for place in places.values()}
    return Matching(
        places,
        missing=[entry.name for entry in entries if entry.name not in places],
        unknown=sorted(tensors.keys() - taken),
    )


def _spellings(entry: FileTensor) -> list[tuple[str, int | None]]:
    """The names that an entry can have, and its slice where that name is a stack's."""
    expert = entry.parts[0].expert
    spellings: list[tuple[str, int | None]] = [(entry.name, None)]
    if expert is not None:
        stacked = entry.name.replace(f".experts.{expert}.", ".experts.").removesuffix(".weight")
        spellings.append((stacked, expert))
    trunk, other = TRUNKS
    renamed = [
        (other + name.removeprefix(trunk), index) for name, index in spellings if name.startswith(trunk)
    ]
    return spellings + renamed


def _check(entry: FileTensor, place: Place) -> None:
    held, part = place.held, entry.parts[0]
    wanted = entry.shape if place.expert is None else part.full_shape
    if held.shape != wanted:
        raise UserError(
            f"{held.file}: {held.name} has the shape {list(held.shape)}, and config.json asks for "
            f"{list(wanted)}; bring the config.json that belongs to these weights"
        )
    if held.dtype not in DTYPES:
        raise UserError(
            f"{held.file}: {held.name} is {str(held.dtype).removeprefix('torch.')}; "
            "only float32, bfloat16 and float16 come in, which fp32 holds exactly"
        )
