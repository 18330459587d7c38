"""SSD as its recurrence: the executable specification that every faster form is tested against.

Mamba-2 (arXiv 2405.21060, section 6), one token after another, any float dtype.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ssd_naive"]


def ssd_naive(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state_BHPN: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``.

    ``dt = clamp(softplus(dt + dt_bias), dt_limit)``. The state is zero at the first token of a
    document; document 0 continues from the initial state.

    Returns:
        y (B, L, H, P) and the state after the last token (B, H, P, N).
    """
    batch, length, heads, head_dim = x_BLHP.shape
    repeat = heads // B_BLGN.shape[2]
    B_BLHN = B_BLGN.repeat_interleave(repeat, dim=2)
    C_BLHN = C_BLGN.repeat_interleave(repeat, dim=2)
    if dt_bias_H is not None:
        dt_BLH = dt_BLH + dt_bias_H
    dt_BLH = F.softplus(dt_BLH).clamp(*dt_limit)

    state = x_BLHP.new_zeros(batch, heads, head_dim, B_BLGN.shape[3])
    previous = torch.zeros(batch, dtype=torch.int64, device=x_BLHP.device)
    if initial_state_BHPN is not None:
        state = initial_state_BHPN
    outputs = []
    for t in range(length):
        if document_ids_BL is not None:
            same = document_ids_BL[:, t] == previous
            state = torch.where(same[:, None, None, None], state, 0.0)
            previous = document_ids_BL[:, t]
        decay = torch.exp(dt_BLH[:, t] * A_H)[..., None, None]
        update = torch.einsum("bh,bhp,bhn->bhpn", dt_BLH[:, t], x_BLHP[:, t], B_BLHN[:, t])
        state = decay * state + update
        y = torch.einsum("bhpn,bhn->bhp", state, C_BLHN[:, t])
        outputs.append(y if D_H is None else y + D_H[:, None] * x_BLHP[:, t])
    return torch.stack(outputs, dim=1), state
