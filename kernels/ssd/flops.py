"""FLOPs of SSD's stages for `torch.utils.flop_counter`: matrix products, two a multiply-add."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import eager  # noqa: F401  (it registers the operators)

__all__: list[str] = []


def _sizes(x_shape: Any, B_shape: Any) -> tuple[int, int, int, int, int]:
    batch, length, heads, head_dim = x_shape
    groups, state_size = B_shape[2:]
    return batch * length, heads, head_dim, groups, state_size


@register_flop_formula(torch.ops.plait.ssd_chunk_state)
def _chunk_state(x_shape, dt_shape, A_shape, B_shape, documents_shape, chunk_size, *args, **kwargs) -> int:
    tokens, heads, head_dim, _, state_size = _sizes(x_shape, B_shape)
    return 2 * tokens * heads * head_dim * state_size


@register_flop_formula(torch.ops.plait.ssd_chunk_output)
def _chunk_output(x_shape, dt_shape, log_decay_shape, B_shape, *args, **kwargs) -> int:
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    Q = log_decay_shape[2]
    return 2 * tokens * (Q * groups * state_size + Q * heads * head_dim + heads * head_dim * state_size)


@register_flop_formula(torch.ops.plait.ssd_chunk_output_backward)
def _chunk_output_backward(grad_y_shape, x_shape, dt_shape, log_decay_shape, B_shape, *args, **kwargs) -> int:
    tokens, heads, head_dim, groups, state_size = _sizes(x_shape, B_shape)
    Q = log_decay_shape[2]
    inside = 3 * Q * groups * state_size + 2 * Q * heads * head_dim
    return 2 * tokens * (inside + 3 * heads * head_dim * state_size)


@register_flop_formula(torch.ops.plait.ssd_chunk_state_backward)
def _chunk_state_backward(
    grad_states_shape, grad_decay_shape, x_shape, dt_shape, A_shape, log_decay_shape, B_shape, *args, **kwargs
) -> int:
    tokens, heads, head_dim, _, state_size = _sizes(x_shape, B_shape)
    return 4 * tokens * heads * head_dim * state_size
