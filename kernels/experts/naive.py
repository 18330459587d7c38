"""The executable specification: how a token's experts are chosen, and its way through them, one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["choose_experts_naive", "experts_naive"]


def choose_experts_naive(
    score_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, top_k_groups: int
) -> Tensor:
    """The best experts (T, K) by score plus bias, the best first, of the groups whose two best are best."""
    chosen = []
    for score_E in score_TE:
        merit = (score_E + bias_E).tolist()
        size = len(merit) // num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        groups.sort(key=lambda group: -sum(sorted((merit[e] for e in group), reverse=True)[:2]))
        candidates = [e for group in groups[:top_k_groups] for e in group]
        chosen.append(sorted(candidates, key=lambda e: -merit[e])[:top_k])
    return torch.tensor(chosen, dtype=torch.int64)


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
