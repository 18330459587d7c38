"""What torch knows of the routed experts: ``plait::choose_experts``, and ``plait::experts_dispatch``,
``experts_combine``, ``grouped_linear`` with their backwards, and the functions that call them.

Shapes: T tokens, K experts a token, S = T K rows sorted by expert, E experts, D in, F out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..forms import form_of
from . import eager

__all__ = ["Routing", "choose_experts", "combine", "dispatch", "grouped_linear", "sort_by_expert"]


@dataclass(frozen=True)
class Routing:
    """Where each token's rows lie once they are sorted by expert."""

    order_S: Tensor
    """The (token, choice) pair, as ``token K + choice``, at each sorted row."""
    inverse_TK: Tensor
    """The sorted row of each token's choice."""
    counts_E: Tensor
    """Rows an expert."""


def choose_experts(
    score_TE: Tensor, bias_E: Tensor, *, top_k: int, num_groups: int = 1, top_k_groups: int = 1
) -> Tensor:
    """The best experts (T, K) by score plus bias, the best first; without a gradient.

    Of the best groups only, where there are several: a group's merit is that of its two best experts
    together (arXiv 2412.19437, section 2.1.2). Of experts that are equal, which comes first is the form's.
    """
    return _choose(score_TE, bias_E, top_k, num_groups, top_k_groups)


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


@torch.library.custom_op("plait::choose_experts", mutates_args=())
def _choose(score_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, top_k_groups: int) -> Tensor:
    if form_of(score_TE) == "torch":
        return eager.choose(score_TE, bias_E, top_k, num_groups, top_k_groups)
    from . import triton

    return triton.choose(score_TE, bias_E, top_k, num_groups, top_k_groups)


@_choose.register_fake
def _(score_TE, bias_E, top_k, num_groups, top_k_groups):
    return score_TE.new_empty(score_TE.shape[0], top_k, dtype=torch.int64)


@torch.library.custom_op("plait::experts_dispatch", mutates_args=())
def _dispatch(x_TD: Tensor, order_S: Tensor, inverse_TK: Tensor) -> Tensor:
    if form_of(x_TD) == "torch":
        return eager.dispatch(x_TD, order_S, inverse_TK)
    from . import triton

    return triton.dispatch(x_TD, inverse_TK)


@_dispatch.register_fake
def _(x_TD, order_S, inverse_TK):
    return x_TD.new_empty(order_S.shape[0], x_TD.shape[1])


@torch.library.custom_op("plait::experts_dispatch_backward", mutates_args=())
def _dispatch_backward(grad_SD: Tensor, inverse_TK: Tensor) -> Tensor:
    if form_of(grad_SD) == "torch":
        return eager.dispatch_backward(grad_SD, inverse_TK)
    from . import triton

    return triton.dispatch_backward(grad_SD, inverse_TK)


@_dispatch_backward.register_fake
def _(grad_SD, inverse_TK):
    return grad_SD.new_empty(inverse_TK.shape[0], grad_SD.shape[1])


_dispatch.register_autograd(
    lambda ctx, grad: (_dispatch_backward(grad.contiguous(), ctx.saved_tensors[0]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]),
)


@torch.library.custom_op("plait::experts_combine", mutates_args=())
def _combine(y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    if form_of(y_SD) == "torch":
        return eager.combine(y_SD, weight_TK, inverse_TK)
    from . import triton

    return triton.combine(y_SD, weight_TK, inverse_TK)


@_combine.register_fake
def _(y_SD, weight_TK, inverse_TK):
    return y_SD.new_empty(inverse_TK.shape[0], y_SD.shape[1])


@torch.library.custom_op("plait::experts_combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if form_of(y_SD) == "torch":
        return eager.combine_backward(grad_TD, y_SD, weight_TK, inverse_TK)
    from . import triton

    return triton.combine_backward(grad_TD, y_SD, weight_TK, inverse_TK)


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
    return eager.grouped_linear(x_SD, weight_EFD, counts_E)


@_grouped_linear.register_fake
def _(x_SD, weight_EFD, counts_E):
    return x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("plait::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    return eager.grouped_linear_backward(grad_SF, x_SD, weight_EFD, counts_E)


@_grouped_linear_backward.register_fake
def _(grad_SF, x_SD, weight_EFD, counts_E):
    return torch.empty_like(x_SD), torch.empty_like(weight_EFD)


_grouped_linear.register_autograd(
    lambda ctx, grad: (*_grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.plait.grouped_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.plait.grouped_linear_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * x_shape[0] * weight_shape[1] * weight_shape[2]
