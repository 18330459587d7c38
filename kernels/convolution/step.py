"""The causal depthwise convolution for one token: what generation does after the prompt."""

# B batch, C channels, K taps (the tail has K-1 tokens)

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolution_step"]


def convolution_step(
    x_BC: Tensor,
    tail_BKC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    activation: Literal["silu"] | None = "silu",
) -> Tensor:
    """``act(bias + sum_j weight[:, K-1-j] * x_{t-j})`` for one t, as :func:`causal_convolution`.

    Without a gradient: it moves the tail in place.

    Args:
        x_BC: the token.
        tail_BKC: ``(B, K-1, C)``, the tokens before it, the nearest last and zero where they are of
            another document; becomes the tail of the next token.

    Returns:
        ``(B, C)`` in x's dtype. Sums are fp32 at least.
    """
    acc = torch.promote_types(x_BC.dtype, torch.float32)
    window_BKC = torch.cat([tail_BKC, x_BC[:, None]], dim=1)
    tail_BKC.copy_(window_BKC[:, 1:])
    u_BC = (window_BKC.to(acc) * weight_CK.t().to(acc)).sum(1)
    if bias_C is not None:
        u_BC += bias_C
    return (F.silu(u_BC) if activation == "silu" else u_BC).to(x_BC.dtype)
