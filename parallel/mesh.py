"""The layout: how many ranks an axis has, and where on each this rank stands.

Axes, outer to inner: dp_replicate, dp_shard, sp, tp. Experts fold `ep` out of the inner three.
A `Mesh` is built once and passed on; nothing about the layout is global.

    dp_replicate  copies of the parameters; sequences of the batch
    dp_shard      sequences of the batch; parameters are sharded over dp_shard x sp
    sp            tokens of a sequence
    tp            heads, groups, channels, rows of the vocabulary; between mixers, tokens
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UserError
from .ledger import Ledger

__all__ = ["AXES", "Axis", "Mesh"]

AXES = ("dp_replicate", "dp_shard", "sp", "tp")

FLATTENED = {
    "fsdp": ("dp_shard", "sp"),
    "data": ("dp_replicate", "dp_shard", "sp"),
    "tokens": ("sp", "tp"),
    "world": AXES,
}
"""Axes that are several at once: those that share a parameter's shards, those that hold other tokens at
the mixers, those that hold other tokens of a sequence between them, all."""


PARAMETER_AXES = ("dp_replicate", "fsdp", "tp")
"""Those that say who holds what of a parameter."""


@dataclass(eq=False)
class Axis:
    """The ranks that differ from this one on one axis only, in order; what a collective runs over."""

    name: str
    size: int = 1
    place: int = 0
    """This rank's index among them."""
    group: dist.ProcessGroup | None = None
    """None where nobody else is there."""
    ledger: Ledger | None = None

    @property
    def layer(self) -> int | None:
        """The layer that is being computed, for what is noted later; None without a ledger."""
        return self.ledger.layer if self.ledger is not None else None

    def rank_at(self, place: int) -> int:
        """The global rank at an index of this axis."""
        assert self.group is not None
        return dist.get_global_rank(self.group, place)


@dataclass(frozen=True, eq=False)
class Mesh:
    sizes: Mapping[str, int]
    """Axis -> ranks."""
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    """Over those of `PARAMETER_AXES` that have several ranks; None for one rank, or before `connect`."""
    axes: dict[str, Axis] = field(default_factory=dict)
    states: Axis = field(default_factory=lambda: Axis("sp"))
    """sp, over messages of its own: those of the states travel while others do."""
    state_exchange: str = "auto"
    """How states travel over sp: see `state_passing.py`."""
    fold_queries: bool = True
    """Whether ranks of sp trade queries to even out causal attention: see `attention.py`."""

    @classmethod
    def create(
        cls,
        sizes: Mapping[str, int],
        *,
        rank: int,
        world_size: int,
        state_exchange: str = "auto",
        fold_queries: bool = True,
    ) -> "Mesh":
        """A mesh of `sizes`, checked against the ranks that were started; `connect` makes it speak.

        Raises:
            UserError: the axes' product is not the number of ranks.
        """
        needed = math.prod(sizes[axis] for axis in AXES)
        if needed != world_size:
            layout = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "one rank"
            ranks = f"{needed} rank{'s' if needed > 1 else ''}"
            started = f"{world_size} {'was' if world_size == 1 else 'were'} started"
            raise UserError(
                f"parallel: {layout} needs {ranks} but {started}; "
                f"start {ranks} with plait launch local or torchrun, or change parallel.*"
            )
        mesh = cls(
            {axis: sizes[axis] for axis in AXES},
            rank,
            state_exchange=state_exchange,
            fold_queries=fold_queries,
        )
        mesh.axes.update(mesh._silent_axes())
        return mesh

    @classmethod
    def single(cls) -> "Mesh":
        """One rank by itself."""
        return cls.create(dict.fromkeys(AXES, 1), rank=0, world_size=1)

    def connect(self, device: torch.device) -> "Mesh":
        """This mesh with its process groups; every rank of the default group calls it alike."""
        if self.world_size == 1:
            return self
        # HSDP wants an axis of shards, be it of one rank.
        names = [
            n for n in PARAMETER_AXES if self.size(n) > 1 or (n == "fsdp" and self.size("dp_replicate") > 1)
        ]
        device_mesh = init_device_mesh(
            device.type, tuple(self.size(name) for name in names), mesh_dim_names=tuple(names)
        )
        known = {tuple(range(self.world_size)): dist.group.WORLD}
        known |= {tuple(self.ranks(name)): device_mesh.get_group(name) for name in names}
        axes = self._silent_axes()
        for name, axis in axes.items():
            ranks = tuple(self.ranks(name))
            if axis.size > 1 and ranks not in known:
                known[ranks] = _new_group(ranks)
            axis.group = known.get(ranks)
        states = Axis("sp", self.sizes["sp"], self.place("sp"))
        if states.size > 1:
            states.group = _new_group(tuple(self.ranks("sp")))
        return replace(self, device_mesh=device_mesh, axes=axes, states=states)

    def ranks(self, name: str) -> list[int]:
        """The ranks that stand where this one does on all other axes, in the order of their places."""
        along = FLATTENED.get(name, (name,))
        strides = {a: math.prod(self.sizes[b] for b in AXES[i + 1 :]) for i, a in enumerate(AXES)}
        first = sum(self.place(a) * strides[a] for a in AXES if a not in along)
        steps = itertools.product(*([strides[a] * k for k in range(self.sizes[a])] for a in along))
        return [first + sum(step) for step in steps]

    def _silent_axes(self) -> dict[str, Axis]:
        return {name: Axis(name, self.size(name), self.place(name)) for name in (*AXES, *FLATTENED)}

    def size(self, name: str) -> int:
        """Ranks on an axis, or on a flattened one."""
        return math.prod(self.sizes[axis] for axis in FLATTENED.get(name, (name,)))

    def place(self, name: str) -> int:
        """This rank's index on an axis, or on a flattened one."""
        place = 0
        for axis in FLATTENED.get(name, (name,)):
            inner = math.prod(self.sizes[a] for a in AXES[AXES.index(axis) + 1 :])
            place = place * self.sizes[axis] + self.rank // inner % self.sizes[axis]
        return place

    @property
    def sp(self) -> Axis:
        return self.axes["sp"]

    @property
    def tp(self) -> Axis:
        return self.axes["tp"]

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def data_ranks(self) -> int:
        """How many ways a batch's sequences are divided."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    def rows(self, batch_size: int) -> slice:
        """The sequences of a batch that this rank reads."""
        place = self.place("dp_replicate") * self.sizes["dp_shard"] + self.place("dp_shard")
        return slice(
            batch_size * place // self.data_ranks,
            batch_size * (place + 1) // self.data_ranks,
        )

    def shard_length(self, length: int) -> int:
        """Tokens of a sequence on each rank of `sp`, padding at the sequence's end included."""
        return -(-length // self.size("tokens")) * self.sizes["tp"]

    def tokens(self, length: int) -> tuple[int, int]:
        """First and end of a sequence's own tokens on this rank, before `tp` cuts them further."""
        shard = self.shard_length(length)
        first = min(length, shard * self.place("sp"))
        return first, min(length, first + shard)

    @contextmanager
    def record(self) -> Iterator[Ledger]:
        """Note every collective in a ledger while the context lasts."""
        ledger = Ledger()
        everywhere = [*self.axes.values(), self.states]
        for axis in everywhere:
            axis.ledger = ledger
        try:
            yield ledger
        finally:
            for axis in everywhere:
                axis.ledger = None

    def layer(self, index: int) -> AbstractContextManager[None]:
        """What is sent inside belongs to a layer, where somebody keeps a ledger."""
        ledger = self.tp.ledger
        return nullcontext() if ledger is None else ledger.of_layer(index)


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    # Only its members make it: making every group on every rank takes minutes on thousands.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
