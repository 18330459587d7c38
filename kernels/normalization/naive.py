"""The executable specification of the norms."""

# D width, … any leading dims

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dim."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight_D


def gated_rms_norm(x: Tensor, z: Tensor, weight_D: Tensor, eps: float, num_groups: int) -> Tensor:
    """The gate first, then RMSNorm over each of ``num_groups`` equal groups of channels."""
    groups = (x * F.silu(z)).chunk(num_groups, -1)
    weights = weight_D.chunk(num_groups)
    return torch.cat([rms_norm(h, w, eps) for h, w in zip(groups, weights, strict=True)], -1)
