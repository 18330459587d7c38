"""The layouts that are compared with one rank, as `parallel` of a config."""

from typing import Any

__all__ = ["CALM", "EXCHANGES", "EXPERTS", "LAYOUTS", "PRODUCTS", "WITHOUT_EXPERTS", "Layout", "name"]

Layout = dict[str, Any]

EXCHANGES = ("ring", "gather", "scan")

LAYOUTS: list[Layout] = [
    *({"tp": tp} for tp in (2, 4)),
    *({"sp": sp, "state_exchange": kind} for sp in (2, 3, 4, 8) for kind in EXCHANGES),
    {"sp": 4, "fold_queries": False},
    *({"dp_shard": dp} for dp in (2, 4)),
    {"dp_replicate": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_shard": 4, "sp": 2},
]

PRODUCTS: list[Layout] = [
    {"sp": 2, "tp": 2},
    {"dp_shard": 2, "sp": 2},
    {"dp_shard": 2, "tp": 2},
    {"dp_replicate": 2, "sp": 2, "tp": 2},
]

EXPERTS: list[Layout] = [
    {"dp_shard": 2, "ep": 2},
    {"sp": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"sp": 4, "ep": 4},
    {"tp": 4, "ep": 2},
    {"sp": 2, "tp": 2, "ep": 4},
    {"dp_shard": 2, "tp": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 4},
    {"dp_replicate": 2, "sp": 2, "ep": 2},
    {"dp_replicate": 2, "dp_shard": 2, "sp": 2, "ep": 2},
    {"dp_replicate": 2, "dp_shard": 2, "sp": 2, "ep": 4},
    {"dp_shard": 2, "sp": 2, "tp": 2, "ep": 8},
    # Three ranks have the same experts, and three divide neither these nor the vocabulary's rows.
    {"sp": 3, "tp": 2, "ep": 2},
    {"sp": 3, "tp": 2},
]


CALM = {"optim.lr": 0.001}
"""At ten times this rate, twenty steps of so small a model grow a rounding to a percent of the norm."""

# A router's near-tie flips by rounding, and then a token has another expert.
WITHOUT_EXPERTS = CALM | {"train.dtype": "float32", "model.pattern": "M*-M"}
"""What is changed in the config where fp32 is held against one rank."""


def name(layout: Layout) -> str:
    parts = [f"{key}{value}" if isinstance(value, int) else value for key, value in layout.items()]
    return "-".join(parts) or "one-rank"
