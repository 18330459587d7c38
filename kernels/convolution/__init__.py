"""The causal depthwise convolution in front of the SSM, with SiLU, documents and a halo.

    y_t = silu(bias + sum_j weight[:, K-1-j] * x_{t-j}),    j = 0 … K-1

Tokens before the sequence come from a halo; a tap counts only within the document of its token.

Read naive.py (the specification), then eager.py (the same in cache-sized blocks, with the backward
by hand), then operators.py (what torch knows it by: ``plait::causal_convolution``). step.py takes one
token after another.
"""

from .operators import causal_convolution
from .step import convolution_step

__all__ = ["causal_convolution", "convolution_step"]
