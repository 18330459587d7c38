"""The layout: how many ranks an axis has, and where on each this rank stands.

Axes, outer to inner: dp_replicate, dp_shard, sp, tp. Experts fold `ep` out of the inner three.
A `Mesh` is built once and passed on; nothing about the layout is global.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

__all__ = ["AXES", "Mesh"]

AXES = ("dp_replicate", "dp_shard", "sp", "tp")


@dataclass(frozen=True)
class Mesh:
    sizes: Mapping[str, int]
    """Axis -> ranks."""
    rank: int = 0

    @classmethod
    def create(cls, sizes: Mapping[str, int], *, rank: int, world_size: int) -> "Mesh":
        """A mesh of `sizes`, checked against the ranks that were started.

        Raises:
            UserError: the axes' product is not the number of ranks.
        """
        needed = math.prod(sizes[axis] for axis in AXES)
        if needed != world_size:
            layout = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
            raise UserError(
                f"parallel: {layout} needs {needed} rank(s) but {world_size} were started; "
                f"start {needed} or change parallel.*"
            )
        return cls({axis: sizes[axis] for axis in AXES}, rank)

    def place(self, axis: str) -> int:
        """This rank's index on an axis."""
        inner = math.prod(self.sizes[a] for a in AXES[AXES.index(axis) + 1 :])
        return self.rank // inner % self.sizes[axis]

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
