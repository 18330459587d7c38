"""FLOPs of SSD's stages for `torch.utils.flop_counter`: matrix products, two a multiply-add."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import operators  # noqa: F401  (it registers the operators)

__all__ = ["forward"]


def _sizes(x_shape: Any, B_shape: Any) -> tuple[int, int, int, int, int]:
    batch, length, heads, head_dim = x_shape
    groups, state_size = B_shape[2:]
    return batch * length, heads, head_dim, groups, state_size


def forward(x_shape: Any, B_shape: Any, chunk_size: int) -> int:
    """Both halves."""
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    inside = chunk_size * (groups * state_size + heads * head_dim)
    return 2 * tokens * (inside + 2 * heads * head_dim * state_size)


@register_flop_formula(torch.ops.plait.ssd_begin)
def _begin(x_shape, dt_shape, A_shape, B_shape, *args, **kwargs) -> int:
    tokens, heads, head_dim, _, state_size = _sizes(x_shape, B_shape)
    return 2 * tokens * heads * head_dim * state_size


@register_flop_formula(torch.ops.plait.ssd_finish)
def _finish(x_shape, dt_shape, log_decay_shape, B_shape, *args, **kwargs) -> int:
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    Q = log_decay_shape[2]
    return 2 * tokens * (Q * groups * state_size + Q * heads * head_dim + heads * head_dim * state_size)


@register_flop_formula(torch.ops.plait.ssd_finish_backward)
def _finish_backward(
    grad_y_shape, x_shape, dt_shape, log_decay_shape, decay_shape, B_shape, *args, **kwargs
) -> int:
    """dC by the tokens of the chunk and by the state entering, and the gradient of that state."""
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    Q = log_decay_shape[2]
    inside = Q * groups * state_size + Q * heads * head_dim
    return 2 * tokens * (inside + 2 * heads * head_dim * state_size)


@register_flop_formula(torch.ops.plait.ssd_begin_backward)
def _begin_backward(
    kept_shapes, grad_final_shape, grad_y_shape, x_shape, dt_shape, A_shape, B_shape, C_shape, D_shape,
    bias_shape, dt_MHQ_shape, *args, **kwargs,
) -> int:  # fmt: skip
    """dx, dB and the decays' gradients by C B^T again, and by the gradient of the state leaving."""
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    Q = dt_MHQ_shape[2]
    inside = 2 * Q * groups * state_size + Q * heads * head_dim
    return 2 * tokens * (inside + 3 * heads * head_dim * state_size)
