"""The executable specification of the causal depthwise convolution: a loop over tokens and taps."""

# B batch, L length, C channels, K taps (a halo has K-1 tokens)

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_convolution"]


def causal_convolution(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    halo_BKC: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """``y_t = act(bias + sum_j weight[:, K-1-j] * x_{t-j})``, over the taps in t's own document."""
    B, L, C = x_BLC.shape
    K = weight_CK.shape[1]
    if halo_BKC is None:
        halo_BKC = x_BLC.new_zeros(B, K - 1, C)
    if document_ids_BL is None:
        document_ids_BL = torch.zeros(B, L, dtype=torch.int64, device=x_BLC.device)
    outputs = []
    for t in range(L):
        y_BC = x_BLC.new_zeros(B, C) if bias_C is None else bias_C.expand(B, C)
        for j in range(K):
            if t - j >= 0:
                tap_BC, document_B = x_BLC[:, t - j], document_ids_BL[:, t - j]
            else:
                # The halo's last token stands at t - j = -1; all of it belongs to document 0.
                tap_BC, document_B = halo_BKC[:, t - j], torch.zeros_like(document_ids_BL[:, 0])
            same_B = document_B == document_ids_BL[:, t]
            y_BC = y_BC + torch.where(same_B[:, None], weight_CK[:, K - 1 - j] * tap_BC, 0.0)
        outputs.append(F.silu(y_BC) if activation == "silu" else y_BC)
    return torch.stack(outputs, 1)
