"""RMSNorm and the gated group norm in Triton: one kernel forward and one backward.

A program holds some tokens' whole groups in registers, so that each tensor is read once. In the backward it
walks over many tokens of one group and keeps the weight's gradient; the programs' sums are added up after.
Where ranks share a group, two smaller kernels make the sums that they exchange first.

kernels.py holds the kernels, launch.py what calls them.
"""

from .launch import (
    add_backward,
    add_forward,
    backward,
    dot_products,
    fits,
    forward,
    gradients,
    output,
    squares,
)

__all__ = [
    "add_backward",
    "add_forward",
    "backward",
    "dot_products",
    "fits",
    "forward",
    "gradients",
    "output",
    "squares",
]
