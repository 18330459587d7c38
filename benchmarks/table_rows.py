"""Rows of the tables that benchmarks write, and how turns over ranks become a number in them."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["by_turn", "heading", "line", "median_ratio"]


def heading(*names: str) -> Iterator[str]:
    """The two lines that open a table."""
    yield line(*names)
    yield "|---" * len(names) + "|"


def line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def by_turn(
    records: Sequence[dict[str, Any]], what: str, over_ranks: Callable[[Sequence[float]], float]
) -> list[float]:
    """For each turn one number of what every rank's record lists by turns."""
    return [over_ranks(turn) for turn in zip(*(record[what] for record in records), strict=True)]


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median over turns of these divided by those."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
