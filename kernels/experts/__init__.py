"""Routed experts on one device: sort tokens by expert, a product an expert, and back by weight.

`naive.py` is the specification; `operators.py` holds the four steps, in the order of their use:
`sort_by_expert`, `dispatch`, `grouped_linear` (twice or thrice), `combine`; `eager.py` does them in torch
operators, `triton/` the two that move rows in one kernel each.
"""

from .naive import experts_naive
from .operators import Routing, combine, dispatch, grouped_linear, sort_by_expert

__all__ = ["Routing", "combine", "dispatch", "experts_naive", "grouped_linear", "sort_by_expert"]
