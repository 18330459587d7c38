"""What stands between the two matrices of an MLP or an expert.

    squared_relu(x) = max(x, 0)²        swiglu(gate, up) = silu(gate) * up

Both keep nothing but their inputs for the backward. Read naive.py (the specification), then eager.py
(the same in few passes over memory, with the backward by hand), then operators.py (what torch knows
them by: ``plait::squared_relu``, ``plait::swiglu``).
"""

from .operators import squared_relu, swiglu

__all__ = ["squared_relu", "swiglu"]
