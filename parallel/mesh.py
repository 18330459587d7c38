"""The layout: how many ranks an axis has, and where on each this rank stands.

A `Mesh` is built once and passed on; nothing about the layout is global. Axes, outer to inner:

    dp_replicate  copies of the parameters; sequences of the batch
    dp_shard      sequences of the batch; parameters are sharded over dp_shard x sp
    sp            tokens of a sequence
    tp            heads, groups, channels, rows of the vocabulary; between mixers, tokens

Between mixers the inner three hold different tokens, and experts see no others: so for the experts
alone the same ranks are divided anew, into `efsdp x ep`.

    ep            experts; neighbours, so that tokens travel as little way as can be
    efsdp         shards of the experts' parameters
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import UserError
from .axes import AXES, LAYOUT, describe_layout, num_ranks
from .ledger import Ledger
from .waits import Waits, waits_on

__all__ = ["Axis", "Mesh"]

FLATTENED = {
    "fsdp": ("dp_shard", "sp"),
    "data": ("dp_replicate", "dp_shard", "sp"),
    "tokens": ("sp", "tp"),
    "replica": ("dp_shard", "sp", "tp"),
    "world": AXES,
}
"""Axes that are several at once: those that share a parameter's shards, those that hold other tokens at
the mixers, those that hold other tokens of a sequence between them, those that hold one copy of the
parameters, all."""

PARAMETER_AXES = ("dp_replicate", "fsdp", "tp")
EXPERT_AXES = ("dp_replicate", "efsdp", "ep")
"""Those that say who holds what of a parameter, and of an expert's."""


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
    waits: Waits = field(default_factory=Waits)
    """Where what is waited for counts; all axes of a mesh have the same."""

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
    """Axis -> ranks, `ep` among them."""
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    """Over those of `PARAMETER_AXES` that have several ranks; None for one rank, or before `connect`."""
    expert_mesh: DeviceMesh | None = None
    """Likewise, of `EXPERT_AXES`."""
    axes: dict[str, Axis] = field(default_factory=dict)
    states: Axis = field(default_factory=lambda: Axis("sp"))
    """sp, over messages of its own: those of the states travel while others do."""
    waits: Waits = field(default_factory=Waits)
    """How long this rank has waited for others."""
    state_exchange: str = "auto"
    """How states travel over sp: see `state_passing.py`."""
    fold_queries: bool = True
    """Whether ranks of sp trade queries to even out causal attention: see `attention.py`."""
    keep_dispatched: bool = False
    """Whether a recomputed layer keeps the rows that its experts' ranks sent: see `experts.py`."""

    @classmethod
    def create(
        cls,
        sizes: Mapping[str, int],
        *,
        rank: int,
        world_size: int,
        state_exchange: str = "auto",
        fold_queries: bool = True,
        keep_dispatched: bool = False,
    ) -> "Mesh":
        """A mesh, checked against the ranks that were started; `connect` makes it speak.

        Args:
            sizes: axis -> ranks; an axis left out has one.

        Raises:
            UserError: the axes' product is not the number of ranks.
        """
        sizes = {axis: sizes.get(axis, 1) for axis in LAYOUT}
        needed = num_ranks(sizes)
        if needed != world_size:
            ranks = f"{needed} rank{'s' if needed > 1 else ''}"
            started = f"{world_size} {'was' if world_size == 1 else 'were'} started"
            raise UserError(
                f"parallel: {describe_layout(sizes)} needs {ranks} but {started}; "
                f"start {ranks} with plait launch local or torchrun, or change parallel.*"
            )
        mesh = cls(
            sizes,
            rank,
            state_exchange=state_exchange,
            fold_queries=fold_queries,
            keep_dispatched=keep_dispatched,
        )
        mesh.axes.update(mesh._silent_axes())
        return mesh

    @classmethod
    def single(cls) -> "Mesh":
        """One rank by itself."""
        return cls.create({}, rank=0, world_size=1)

    def connect(self, device: torch.device) -> "Mesh":
        """This mesh with its process groups; every rank of the default group calls it alike."""
        if self.world_size == 1:
            return self
        everybody = dist.group.WORLD
        assert everybody is not None
        known = {tuple(range(self.world_size)): everybody}

        def group_of(name: str) -> dist.ProcessGroup:
            ranks = tuple(self.ranks(name))
            if ranks not in known:
                known[ranks] = _new_group(ranks)
            return known[ranks]

        def device_mesh(among: tuple[str, ...]) -> DeviceMesh:
            # HSDP wants an axis of shards, be it of one rank.
            sharded = self.sizes["dp_replicate"] > 1
            names = tuple(n for n in among if self.size(n) > 1 or (sharded and n in ("fsdp", "efsdp")))
            places = torch.arange(self.world_size).view([self.size(name) for name in names])
            groups = [group_of(name) for name in names]
            return DeviceMesh.from_group(
                groups if len(groups) > 1 else groups[0], device.type, places, mesh_dim_names=names
            )

        axes, waits = self._silent_axes(), waits_on(device)
        for name, axis in axes.items():
            axis.group, axis.waits = group_of(name) if axis.size > 1 else None, waits
        states = Axis("sp", self.sizes["sp"], self.place("sp"), waits=waits)
        if states.size > 1:
            states.group = _new_group(tuple(self.ranks("sp")))
        return replace(
            self,
            device_mesh=device_mesh(PARAMETER_AXES),
            expert_mesh=device_mesh(EXPERT_AXES),
            axes=axes,
            states=states,
            waits=waits,
        )

    def ranks(self, name: str) -> list[int]:
        """The ranks that stand where this one does on all other axes, in the order of their places."""
        factors = self._factors(name)
        first = self.rank - sum(self.rank // stride % size * stride for size, stride in factors)
        steps = itertools.product(*([stride * k for k in range(size)] for size, stride in factors))
        return [first + sum(step) for step in steps]

    def _factors(self, name: str) -> list[tuple[int, int]]:
        """What an axis is made of, outer to inner: ranks, and how far their numbers are apart."""
        if name == "ep":
            return [(self.sizes["ep"], 1)]
        if name == "efsdp":
            return [(self.size("replica") // self.sizes["ep"], self.sizes["ep"])]
        return [
            (self.sizes[axis], math.prod(self.sizes[inner] for inner in AXES[AXES.index(axis) + 1 :]))
            for axis in FLATTENED.get(name, (name,))
        ]

    def _silent_axes(self) -> dict[str, Axis]:
        names = (*AXES, *FLATTENED, "efsdp", "ep")
        return {name: Axis(name, self.size(name), self.place(name)) for name in names}

    def size(self, name: str) -> int:
        """Ranks on an axis, or on a flattened one."""
        return math.prod(size for size, _ in self._factors(name))

    def place(self, name: str) -> int:
        """This rank's index on an axis, or on a flattened one."""
        place = 0
        for size, stride in self._factors(name):
            place = place * size + self.rank // stride % size
        return place

    @property
    def sp(self) -> Axis:
        return self.axes["sp"]

    @property
    def tp(self) -> Axis:
        return self.axes["tp"]

    @property
    def ep(self) -> Axis:
        return self.axes["ep"]

    @property
    def world_size(self) -> int:
        return num_ranks(self.sizes)

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

    def most_rows(self, batch_size: int) -> int:
        """The sequences of the rank that reads most."""
        return -(-batch_size // self.data_ranks)

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
