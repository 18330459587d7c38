"""The executable specification of the loss; it holds all the logits."""

# T tokens, D width, V vocabulary

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(total, cross_entropy)``: sums over the targets that are not -100."""
    cross_entropy = z_penalty = hidden_TD.new_zeros(())
    for hidden_D, target in zip(hidden_TD, targets_T.tolist(), strict=True):
        if target != -100:
            logits_V = weight_VD @ hidden_D
            lse = torch.log(torch.exp(logits_V - logits_V.max().detach()).sum()) + logits_V.max().detach()
            cross_entropy = cross_entropy + lse - logits_V[target]
            z_penalty = z_penalty + lse**2
    return cross_entropy + z_loss * z_penalty, cross_entropy.detach()
