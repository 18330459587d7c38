"""Tokens to their sorted rows and back, and a product an expert, in torch operators.

Every sum over a token's experts gathers their rows, one choice after another, in the forward and in the
backward, so that no atomic and no scatter decides the bits.

Shapes: T tokens, K experts a token, S = T K rows sorted by expert, E experts, D in, F out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import product_dtype

__all__ = [
    "choose",
    "combine",
    "combine_backward",
    "dispatch",
    "dispatch_backward",
    "grouped_linear",
    "grouped_linear_backward",
]


def choose(score_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, top_k_groups: int) -> Tensor:
    """The best experts (T, K) of the best groups."""
    merit_TE = score_TE + bias_E
    if top_k_groups < num_groups:
        merit_TGe = merit_TE.unflatten(-1, (num_groups, -1))
        best_TG = merit_TGe.topk(min(2, merit_TGe.shape[-1]), dim=-1).values.sum(-1)
        groups = best_TG.topk(top_k_groups, dim=-1).indices
        others_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(-1, groups, False)
        merit_TE = merit_TGe.masked_fill(others_TG[..., None], -torch.inf).flatten(-2)
    return merit_TE.topk(top_k, dim=-1).indices


def dispatch(x_TD: Tensor, order_S: Tensor, inverse_TK: Tensor) -> Tensor:
    """Each token at its K sorted rows (S, D)."""
    return x_TD.index_select(0, order_S // inverse_TK.shape[1])


def dispatch_backward(grad_SD: Tensor, inverse_TK: Tensor) -> Tensor:
    """The sum of each token's K rows (T, D), at least fp32 until it is rounded."""
    if inverse_TK.shape[1] == 1:
        return grad_SD.index_select(0, inverse_TK[:, 0])
    acc = torch.promote_types(grad_SD.dtype, torch.float32)
    total = grad_SD.index_select(0, inverse_TK[:, 0]).to(acc)
    for choice in range(1, inverse_TK.shape[1]):
        total += grad_SD.index_select(0, inverse_TK[:, choice])
    return total.to(grad_SD.dtype)


def combine(y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """The sum of each token's K rows by its weights (T, D)."""
    acc = torch.promote_types(y_SD.dtype, torch.float32)
    weight = weight_TK.to(acc)
    total = y_SD.index_select(0, inverse_TK[:, 0]).to(acc).mul_(weight[:, :1])
    for choice in range(1, inverse_TK.shape[1]):
        rows = y_SD.index_select(0, inverse_TK[:, choice])
        total.addcmul_(rows.to(acc), weight[:, choice : choice + 1])
    return total.to(y_SD.dtype)


def combine_backward(
    grad_TD: Tensor, y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weights."""
    acc = torch.promote_types(y_SD.dtype, torch.float32)
    grad, weight = grad_TD.to(acc), weight_TK.to(acc)
    grad_y, grad_weight = torch.empty_like(y_SD), torch.empty_like(weight)
    # A choice at a time: at once, tokens times choices would stand in fp32 three times.
    for choice in range(inverse_TK.shape[1]):
        rows = inverse_TK[:, choice]
        grad_weight[:, choice] = (grad * y_SD.index_select(0, rows)).sum(-1)
        grad_y.index_copy_(0, rows, (grad * weight[:, choice, None]).to(y_SD.dtype))
    return grad_y, grad_weight.to(weight_TK.dtype)


def grouped_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Each row times the transposed matrix of its expert (S, F)."""
    if (wide := product_dtype(x_SD)) != x_SD.dtype:
        return grouped_linear(x_SD.to(wide), weight_EFD.to(wide), counts_E).to(x_SD.dtype)
    if _fits_grouped_mm(x_SD, weight_EFD):
        return F.grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=_ends(counts_E))
    out = x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])
    for e, rows in _groups(counts_E):
        torch.mm(x_SD[rows], weight_EFD[e].T, out=out[rows])
    return out


def grouped_linear_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the matrices."""
    if (wide := product_dtype(x_SD)) != x_SD.dtype:
        gradients = grouped_linear_backward(grad_SF.to(wide), x_SD.to(wide), weight_EFD.to(wide), counts_E)
        return gradients[0].to(x_SD.dtype), gradients[1].to(weight_EFD.dtype)
    if _fits_grouped_mm(x_SD, weight_EFD):
        ends = _ends(counts_E)
        grad_x = F.grouped_mm(grad_SF, weight_EFD, offs=ends)
        return grad_x, F.grouped_mm(grad_SF.T, x_SD, offs=ends)
    grad_x, grad_weight = torch.empty_like(x_SD), torch.zeros_like(weight_EFD)
    for e, rows in _groups(counts_E):
        torch.mm(grad_SF[rows], weight_EFD[e], out=grad_x[rows])
        torch.mm(grad_SF[rows].T, x_SD[rows], out=grad_weight[e])
    return grad_x, grad_weight


def _fits_grouped_mm(x_SD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether torch has one product for all groups: at most fp32, rows of multiples of 16 bytes."""
    if x_SD.dtype == torch.float64 or x_SD.shape[0] == 0:
        return False
    return all(width * x_SD.itemsize % 16 == 0 for width in weight_EFD.shape[1:])


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _groups(counts_E: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, with those rows."""
    groups, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        if count:
            groups.append((e, slice(start, start + count)))
        start += count
    return groups
