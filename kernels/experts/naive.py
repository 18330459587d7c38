"""A token through its experts, one expert after another: the executable specification."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["experts_naive"]


def experts_naive(
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """``out_t = sum_k weight_tk down_e(activation(up_e x_t))`` with ``e = expert_tk``; returns (T, D)."""
    out = torch.zeros_like(x_TD)
    for e in range(up_EFD.shape[0]):
        token, slot = torch.where(expert_TK == e)
        hidden = activation(x_TD[token] @ up_EFD[e].T)
        out = out.index_add(0, token, (hidden @ down_EDF[e].T) * weight_TK[token, slot, None])
    return out
