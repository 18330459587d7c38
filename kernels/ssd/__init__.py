"""SSD, the scan of Mamba-2: state space duality in chunks, with states that can leave between stages.

Read `naive.py` (the recurrence, the specification), `layout.py` (chunks and documents),
`eager_forward.py` and `eager_backward.py` (the stages), then `scan.py` (the autograd nodes `begin`
and `finish`, and `ssd`, which is both).
"""

from . import flops as flops  # importing it registers the formulas
from .naive import ssd_naive
from .scan import Exchange, Pending, begin, finish, ssd

__all__ = ["Exchange", "Pending", "begin", "finish", "ssd", "ssd_naive"]
