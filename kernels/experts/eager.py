"""Tokens sorted by expert, one product an expert, and back: dropless, in an order that is fixed.

Every sum over a token's experts gathers their rows, one choice after another, in the forward and in the
backward, so that no atomic and no scatter decides the bits.

Shapes: T tokens, K experts a token, S = T K rows sorted by expert, E experts, D in, F out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["Routing", "combine", "dispatch", "grouped_linear", "sort_by_expert"]


@dataclass(frozen=True)
class Routing:
    """Where each token's rows lie once they are sorted by expert."""

    order_S: Tensor
    """The (token, choice) pair, as ``token K + choice``, at each sorted row."""
    inverse_TK: Tensor
    """The sorted row of each token's choice."""
    counts_E: Tensor
    """Rows an expert."""


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Routing:
    """Sort tokens' choices (T, K) by expert, stably."""
    expert_S, order = torch.sort(expert_TK.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    # Not bincount, for which the host waits.
    ends = torch.searchsorted(expert_S, torch.arange(num_experts, device=order.device), right=True)
    return Routing(order, inverse.view(expert_TK.shape), torch.diff(ends, prepend=ends.new_zeros(1)))


def dispatch(x_TD: Tensor, routing: Routing) -> Tensor:
    """Copy each token to its K sorted rows: (T, D) -> (S, D)."""
    return _dispatch(x_TD, routing.order_S, routing.inverse_TK)


def combine(y_SD: Tensor, weight_TK: Tensor, routing: Routing) -> Tensor:
    """Sum each token's K rows by its weights: (S, D) -> (T, D), accumulated in at least fp32."""
    return _combine(y_SD, weight_TK, routing.inverse_TK)


def grouped_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Each sorted row times the transposed matrix of its expert: (S, D) -> (S, F).

    Args:
        counts_E: rows an expert.
    """
    return _grouped_linear(x_SD, weight_EFD, counts_E)


@torch.library.custom_op("plait::experts_dispatch", mutates_args=())
def _dispatch(x_TD: Tensor, order_S: Tensor, inverse_TK: Tensor) -> Tensor:
    return x_TD.index_select(0, order_S // inverse_TK.shape[1])


@_dispatch.register_fake
def _(x_TD, order_S, inverse_TK):
    return x_TD.new_empty(order_S.shape[0], x_TD.shape[1])


@torch.library.custom_op("plait::experts_dispatch_backward", mutates_args=())
def _dispatch_backward(grad_SD: Tensor, inverse_TK: Tensor) -> Tensor:
    if inverse_TK.shape[1] == 1:
        return grad_SD.index_select(0, inverse_TK[:, 0])
    acc = torch.promote_types(grad_SD.dtype, torch.float32)
    total = grad_SD.index_select(0, inverse_TK[:, 0]).to(acc)
    for choice in range(1, inverse_TK.shape[1]):
        total += grad_SD.index_select(0, inverse_TK[:, choice])
    return total.to(grad_SD.dtype)


@_dispatch_backward.register_fake
def _(grad_SD, inverse_TK):
    return grad_SD.new_empty(inverse_TK.shape[0], grad_SD.shape[1])


_dispatch.register_autograd(
    lambda ctx, grad: (_dispatch_backward(grad.contiguous(), ctx.saved_tensors[0]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]),
)


@torch.library.custom_op("plait::experts_combine", mutates_args=())
def _combine(y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    acc = torch.promote_types(y_SD.dtype, torch.float32)
    weight = weight_TK.to(acc)
    total = y_SD.index_select(0, inverse_TK[:, 0]).to(acc).mul_(weight[:, :1])
    for choice in range(1, inverse_TK.shape[1]):
        rows = y_SD.index_select(0, inverse_TK[:, choice])
        total.addcmul_(rows.to(acc), weight[:, choice : choice + 1])
    return total.to(y_SD.dtype)


@_combine.register_fake
def _(y_SD, weight_TK, inverse_TK):
    return y_SD.new_empty(inverse_TK.shape[0], y_SD.shape[1])


@torch.library.custom_op("plait::experts_combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(y_SD.dtype, torch.float32)
    grad, weight = grad_TD.to(acc), weight_TK.to(acc)
    grad_y, grad_weight = torch.empty_like(y_SD), torch.empty_like(weight)
    # A choice at a time: at once, tokens times choices would stand in fp32 three times.
    for choice in range(inverse_TK.shape[1]):
        rows = inverse_TK[:, choice]
        grad_weight[:, choice] = (grad * y_SD.index_select(0, rows)).sum(-1)
        grad_y.index_copy_(0, rows, (grad * weight[:, choice, None]).to(y_SD.dtype))
    return grad_y, grad_weight.to(weight_TK.dtype)


@_combine_backward.register_fake
def _(grad_TD, y_SD, weight_TK, inverse_TK):
    return y_SD.new_empty(y_SD.shape), weight_TK.new_empty(weight_TK.shape)


def _combine_autograd(ctx, grad):
    return *_combine_backward(grad.contiguous(), *ctx.saved_tensors), None


_combine.register_autograd(
    _combine_autograd, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@torch.library.custom_op("plait::grouped_linear", mutates_args=())
def _grouped_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    if _fits_grouped_mm(x_SD, weight_EFD):
        return F.grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=_ends(counts_E))
    out = x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])
    for e, rows in _groups(counts_E):
        torch.mm(x_SD[rows], weight_EFD[e].T, out=out[rows])
    return out


@_grouped_linear.register_fake
def _(x_SD, weight_EFD, counts_E):
    return x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("plait::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    if _fits_grouped_mm(x_SD, weight_EFD):
        ends = _ends(counts_E)
        grad_x = F.grouped_mm(grad_SF, weight_EFD, offs=ends)
        return grad_x, F.grouped_mm(grad_SF.T, x_SD, offs=ends)
    grad_x, grad_weight = torch.empty_like(x_SD), torch.zeros_like(weight_EFD)
    for e, rows in _groups(counts_E):
        torch.mm(grad_SF[rows], weight_EFD[e], out=grad_x[rows])
        torch.mm(grad_SF[rows].T, x_SD[rows], out=grad_weight[e])
    return grad_x, grad_weight


@_grouped_linear_backward.register_fake
def _(grad_SF, x_SD, weight_EFD, counts_E):
    return torch.empty_like(x_SD), torch.empty_like(weight_EFD)


_grouped_linear.register_autograd(
    lambda ctx, grad: (*_grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


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


@register_flop_formula(torch.ops.plait.grouped_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.plait.grouped_linear_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * x_shape[0] * weight_shape[1] * weight_shape[2]
