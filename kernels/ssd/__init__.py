"""SSD, the scan of Mamba-2: state space duality in chunks, with states that can leave between stages.

Read `naive.py` (the recurrence, the specification), `layout.py` (chunks and documents),
`eager.py` (the stages, forward and backward), then `scan.py` (the autograd nodes `begin`
and `finish`, and `ssd`, which is both). `step.py` is the recurrence for one token, for generation.
"""

from . import flops as flops  # importing it registers the formulas
from .naive import ssd_naive
from .scan import Exchange, Pending, begin, finish, ssd
from .step import ssd_step

__all__ = ["Exchange", "Pending", "begin", "finish", "ssd", "ssd_naive", "ssd_step"]
