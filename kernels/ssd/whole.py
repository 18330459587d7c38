"""``plait::ssd``: both halves of the scan in one operator, for a sequence that no other rank has a part of.

Nothing leaves between the halves and nothing but tensors goes to the backward, so that torch.compile traces
through it; the two nodes of `scan.py` hand each other what an exchange brings.
"""

# B batch, L length, H heads, P head dim, G groups, N state size

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import flops, operators

__all__ = ["ssd"]


@torch.library.custom_op("plait::ssd", mutates_args=())
def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    initial_BHPN: Tensor | None,
    documents_BL: Tensor | None,
    dt_low: float,
    dt_high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, L, H, P), the state after the last token (B, H, P, N), and what the backward needs:
    dt, log_decay, decay, entering, prefix and total of `operators.begin`."""
    dt, log_decay, decay, entering, prefix, total, state = operators.begin(
        x_BLHP, dt_BLH, A_H, B_BLGN, dt_bias_H, documents_BL, dt_low, dt_high, chunk_size
    )
    y = operators.finish(
        x_BLHP, dt, log_decay, B_BLGN, C_BLGN, D_H, entering, prefix, initial_BHPN, documents_BL
    )
    if initial_BHPN is not None:
        state = torch.addcmul(state, initial_BHPN, torch.exp(total)[..., None, None])
    return y, state, dt, log_decay, decay, entering, prefix, total


@ssd.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial, documents, dt_low, dt_high, chunk_size):
    *kept, state = operators.begin(x, dt, A, B, dt_bias, documents, dt_low, dt_high, chunk_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format), state, *kept


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_low, dt_high, _ = inputs
    ctx.dt_limit, ctx.state_shape = (dt_low, dt_high), output[1].shape
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt_raw, A, B, C, D, dt_bias, initial, documents, *kept = ctx.saved_tensors
    dt, log_decay, decay, entering, prefix, total = kept
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    if grad_state is None:
        grad_state = entering.new_zeros(ctx.state_shape)
    grad_C, grad_D, _, partial = operators.finish_backward(
        grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, documents, False
    )
    given = x, dt_raw, A, B, C, D, dt_bias, dt, log_decay, decay, entering, prefix, total, initial, documents
    grad_x, grad_dt, grad_A, grad_B, grad_bias, grad_initial = operators.begin_backward(
        partial, grad_state, grad_y, *given, *ctx.dt_limit
    )
    return (
        grad_x,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        grad_D if D is not None else None,
        grad_bias.to(dt_bias.dtype) if dt_bias is not None else None,
        grad_initial if initial is not None else None,
        *(None,) * 4,
    )


ssd.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.plait.ssd)
def _flops(x_shape, dt_shape, A_shape, B_shape, *args, **kwargs) -> int:
    chunk_size = args[-1]
    return flops.forward(x_shape, B_shape, chunk_size)
