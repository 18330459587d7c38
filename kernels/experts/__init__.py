"""Routed experts on one device: sort tokens by expert, a product an expert, and back by weight.

`naive.py` is the specification; `operators.py` holds the five steps, in the order of their use:
`choose_experts`, `sort_by_expert`, `dispatch`, `grouped_linear` (twice or thrice), `combine`; `eager.py`
does them in torch operators, `triton/` the choice and the two that move rows in one kernel each.
"""

from .naive import choose_experts_naive, experts_naive
from .operators import Routing, choose_experts, combine, dispatch, grouped_linear, sort_by_expert

__all__ = [
    "Routing",
    "choose_experts",
    "choose_experts_naive",
    "combine",
    "dispatch",
    "experts_naive",
    "grouped_linear",
    "sort_by_expert",
]
