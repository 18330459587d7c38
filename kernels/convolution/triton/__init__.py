"""The causal convolution in one Triton kernel forward and one backward.

A program owns a block of channels and walks a span of tokens, with the taps and the last inputs in
registers: each input is read once, each activation made once, and the weight's gradient needs no sum over
threads. Where a document starts, what stands in the registers is set to zero.

kernels.py holds the two kernels, launch.py what calls them; for 2, 3 or 4 taps.
"""

from .launch import backward, fits, forward

__all__ = ["backward", "fits", "forward"]
