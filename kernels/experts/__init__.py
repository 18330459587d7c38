"""Routed experts on one device: sort tokens by expert, a product an expert, and back by weight.

`naive.py` is the specification; `eager.py` holds the four steps, in the order of their use:
`sort_by_expert`, `dispatch`, `grouped_linear` (twice or thrice), `combine`.
"""

from .eager import Routing, combine, dispatch, grouped_linear, sort_by_expert
from .naive import experts_naive

__all__ = ["Routing", "combine", "dispatch", "experts_naive", "grouped_linear", "sort_by_expert"]
