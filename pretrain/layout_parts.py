"""Who holds what in a layout: each rank's sequences, tokens and bytes of parameters, by arithmetic alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from ..parallel.axes import AXES
from ..parallel.mesh import Mesh
from ..parallel.placements import Split, expert_dim, shard_range
from .config import Config
from .model import Hybrid
from .model.hybrid import Layer
from .model.parameters import declared_splits
from .ranks import place_in
from .sharding import expert_modules, matrices

__all__ = ["Holding", "Parts", "ShardedUnit"]

STEP_COUNTER = 4
"""Bytes of AdamW's count of steps, which each parameter has."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Holding:
    """What one rank holds; ranges are of sequences of the batch and of tokens of each sequence."""

    rank: int
    places: Mapping[str, int]
    """Axis -> this rank's index on it."""
    sequences: range
    tokens: range
    """Within a mixer, padding left out."""
    stream: range
    """Between mixers, where tp cuts the tokens further, padding left out."""
    padding: int
    """Tokens of padding that follow those of `stream`, in each sequence."""
    experts: range
    """Of each layer of experts; none where there are none."""
    parameter_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class ShardedUnit:
    """Parameters that are gathered together, in bytes of one rank."""

    layer: int | None
    axis: str
    """fsdp, dp_shard x sp; or efsdp of experts."""
    gathered: int
    """While it computes."""
    gather_sent: int
    """What a rank sends so that all have it."""
    reduce_sent: int
    """What a rank sends so that each has its part of the summed gradient."""
    gradient: int
    """Whole, as micro-batches but the last leave it."""


class Parts:
    """A run's layout, asked about one rank after another; no rank need be there.

    Attributes:
        mesh: that of rank 0, unconnected.
        ranks: of the layout.
        num_parameters: of the model.
        rows: sequences of the rank that has most.
        micro_rows: those of a micro-batch.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ranks = config.parallel.ranks
        self.mesh = self.mesh_of(0)
        with torch.device("meta"):
            self._model = Hybrid(config.model, self.mesh)
        self._splits = declared_splits(self._model)
        self._kinds = Counter(
            (tuple(parameter.shape), self._splits[name]) for name, parameter in self._model.named_parameters()
        )
        self.num_parameters = sum(p.numel() for p in self._model.parameters())
        self.compute_dtype = getattr(torch, config.train.dtype)
        self.storage_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self.rows = self.mesh.most_rows(config.train.batch_size)
        self.micro_rows = min(config.train.micro_batch_size or self.rows, self.rows)
        self._parameter_bytes = cache(self._shard_bytes)

    def mesh_of(self, rank: int) -> Mesh:
        """A rank's place in the layout, without process groups."""
        return place_in(self.config.parallel, rank, self.ranks)

    def of(self, rank: int) -> Holding:
        """What a rank holds."""
        mesh, length = self.mesh_of(rank), self.config.data.seq_len
        moe = self.config.model.moe
        rows = mesh.rows(self.config.train.batch_size)
        part = mesh.shard_length(length) // mesh.tp.size
        first = mesh.place("tokens") * part
        stream = range(min(length, first), min(length, first + part))
        parameter_bytes = self._parameter_bytes(mesh.place("replica"))
        return Holding(
            rank,
            {axis: mesh.place(axis) for axis in AXES},
            range(rows.start, rows.stop),
            range(*mesh.tokens(length)),
            stream,
            part - len(stream),
            range(*shard_range(moe.num_experts, mesh.ep.size, mesh.ep.place)) if moe else range(0),
            parameter_bytes,
            2 * parameter_bytes + STEP_COUNTER * self._kinds.total(),
        )

    @cached_property
    def units(self) -> list[ShardedUnit]:
        """What `shard_model` gathers together, the layers' dtypes taken as one unit; those left out that each
        rank holds whole. The last stays gathered from the forward to the backward."""
        model = self._model
        units = [] if model.head is None else [self._unit(None, {"embedding": model.embedding})]
        for layer in model.layers:
            assert isinstance(layer, Layer)
            modules: dict[str, nn.Module] = {f"layers.{layer.index}": layer}
            if experts := expert_modules(layer):
                units.append(self._unit(layer.index, modules, experts, axis="efsdp"))
            units.append(self._unit(layer.index, modules, matrices(layer)))
        last: dict[str, nn.Module] = {"final_norm": model.final_norm}
        last |= {"embedding": model.embedding} if model.head is None else {"head": model.head}
        units.append(self._unit(None, last))
        copies = self.mesh.sizes["dp_replicate"]
        return [unit for unit in units if self.mesh.size(unit.axis) * copies > 1]

    def units_over(self, axis: str) -> list[ShardedUnit]:
        """Those of an axis, fsdp or efsdp."""
        return [unit for unit in self.units if unit.axis == axis]

    def _shard_bytes(self, place: int) -> int:
        """Of the parameters of the rank at a place of dp_shard x sp x tp."""
        mesh = self.mesh_of(place)
        elements = 0
        for (shape, split), count in self._kinds.items():
            part = self._part(shape, split, mesh.place(split.axis))
            axis, dim = ("efsdp", expert_dim(part, mesh.size("efsdp"))) if split.axis == "ep" else ("fsdp", 0)
            first, end = shard_range(part[dim], mesh.size(axis), mesh.place(axis))
            elements += count * math.prod(part) // part[dim] * (end - first)
        return elements * self.storage_dtype.itemsize

    def _part(self, shape: Shape, split: Split, place: int = 0) -> Shape:
        """What a place of tp or ep holds, before FSDP."""
        if split.dim is None:
            return shape
        first, end = shard_range(shape[split.dim], self.mesh.size(split.axis), place)
        return (*shape[: split.dim], end - first, *shape[split.dim + 1 :])

    def _unit(
        self,
        layer: int | None,
        modules: Mapping[str, nn.Module],
        cast: Sequence[nn.Module] = (),
        axis: str = "fsdp",
    ) -> ShardedUnit:
        """
        Args:
            cast: the modules in it that are gathered in the dtype of the computation, under bf16.
        """
        ranks = self.mesh.size(axis)
        narrow = {parameter for module in cast for parameter in module.parameters()}
        gathered = gather_sent = reduce_sent = gradient = 0
        for name, parameter in _named(modules):
            split = self._splits[name]
            if (split.axis == "ep") != (axis == "efsdp"):
                continue
            itemsize = (self.compute_dtype if parameter in narrow else self.storage_dtype).itemsize
            part = self._part(tuple(parameter.shape), split)
            dim = expert_dim(part, ranks) if axis == "efsdp" else 0
            elements = math.prod(part)
            # Shards travel at the length of the longest.
            shard = -(-part[dim] // ranks) * elements // part[dim]
            gathered += elements * itemsize
            gradient += elements * self.storage_dtype.itemsize
            gather_sent += (ranks - 1) * shard * itemsize
            reduce_sent += (ranks - 1) * shard * self.storage_dtype.itemsize
        return ShardedUnit(layer, axis, gathered, gather_sent, reduce_sent, gradient)


def _named(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{path}.{name}", parameter
