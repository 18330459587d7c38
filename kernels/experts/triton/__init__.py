"""The choice of experts, and tokens to their sorted rows and back, in Triton: one kernel each way.

A program takes a token's channels; its K rows are read or written one after another in the order of its
choices. Each row belongs to one token, so that what is written meets nothing, and the bits are fixed.
"""

from .launch import choose, combine, combine_backward, dispatch, dispatch_backward

__all__ = ["choose", "combine", "combine_backward", "dispatch", "dispatch_backward"]
