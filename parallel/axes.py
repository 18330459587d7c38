"""The axes of a layout by name, outer to inner; without torch, for whoever only reads a config."""

import math
from collections.abc import Mapping

__all__ = ["AXES", "LAYOUT", "describe_layout", "num_ranks"]

AXES = ("dp_replicate", "dp_shard", "sp", "tp")
"""What each means stands in `mesh.py`."""

LAYOUT = (*AXES, "ep")
"""What a layout has a size for; `ep` adds no ranks."""


def num_ranks(sizes: Mapping[str, int]) -> int:
    """Ranks of a layout."""
    return math.prod(sizes[axis] for axis in AXES)


def describe_layout(sizes: Mapping[str, int]) -> str:
    """The axes that have more than one rank; `ep` apart, which is no factor of their number."""
    product = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "one rank"
    return f"{product}, ep {sizes['ep']}" if sizes["ep"] > 1 else product
