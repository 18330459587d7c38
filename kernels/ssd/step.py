"""SSD's recurrence for one token: what generation does after the prompt.

Shapes: B batch, H heads, P head dim, G groups, R = H / G heads a group, N state size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ssd_step"]


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """``h <- exp(dt A) h + dt x B^T``, ``y = h C + D x``: one turn of the loop in `ssd_naive`.

    Without a gradient: it moves the state in place.

    Args:
        state_BHPN: contiguous, at least fp32, such as `ssd` returns; becomes the state after the token.
        x_BHP, B_BGN, C_BGN: of one dtype.
        dt_BH: the step size before bias and softplus.
        A_H: negative, at least fp32, like D and dt_bias.

    Returns:
        y (B, H, P) in x's dtype; sums are in the state's.
    """
    acc = state_BHPN.dtype
    batch, heads, head_dim, state_size = state_BHPN.shape
    groups = B_BGN.shape[1]
    dt = dt_BH.to(acc) if dt_bias_H is None else dt_BH.to(acc) + dt_bias_H
    dt = F.softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    x = x_BHP.to(acc)
    state_BGRPN = state_BHPN.view(batch, groups, -1, head_dim, state_size)
    step_BGRP1 = (dt[..., None] * x).view(batch, groups, -1, head_dim, 1)
    state_BHPN.mul_(torch.exp(dt * A_H)[..., None, None])
    state_BGRPN.addcmul_(step_BGRP1, B_BGN.to(acc)[:, :, None, None])
    # Heads of a group share C: one product a group.
    y = state_BGRPN.flatten(2, 3) @ C_BGN.to(acc)[..., None]
    y = y.view(batch, heads, head_dim)
    if D_H is not None:
        y = y.addcmul_(x, D_H[:, None])
    return y.to(x_BHP.dtype)
