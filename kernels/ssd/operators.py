"""SSD's operators: the two halves of the forward and those of the backward, each in the form that the device
takes.

A state leaves between the halves: `ssd_begin` ends with it and `ssd_finish` starts from what came back,
`ssd_finish_backward` ends with its gradient and `ssd_begin_backward` starts from what came back of that.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length, M chunks in all (batch
rows x chunks a row, the last of a row filled up with tokens whose step is 0). States, decays, dt and every
accumulation are at least fp32.
"""

import torch
from torch import Tensor

from ..forms import form_of
from . import padded

__all__ = ["begin", "begin_backward", "finish", "finish_backward"]


def _form(x: Tensor):
    if form_of(x) == "torch":
        return padded
    # Not before it is wanted: triton takes a while to import, and need not be there.
    from .triton import launch

    return launch


@torch.library.custom_op("plait::ssd_begin", mutates_args=())
def begin(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    dt_bias_H: Tensor | None,
    documents_BL: Tensor | None,
    dt_low: float,
    dt_high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stages 1 and 2: the states that the chunks pass on, from zero.

    Args:
        dt_BLH: step sizes before bias, softplus and clamp.
        documents_BL: document ids; None is one document that continues the state entering.

    Returns:
        dt (M, H, Q), the steps; log_decay (M, H, Q), running within chunk and document; decay (M, H), a
        chunk's total, -inf where a document starts in it; entering (M, H, P, N), the state that each chunk
        finds; prefix (M, H), the log-decay from the sequence's start to each chunk; total (B, H), the
        sequence's; final (B, H, P, N).
    """
    return _form(x_BLHP).begin(
        x_BLHP, dt_BLH, A_H, B_BLGN, dt_bias_H, documents_BL, dt_low, dt_high, chunk_size
    )


@begin.register_fake
def _(x, dt, A, B, dt_bias, documents, dt_low, dt_high, chunk_size):
    batch, length, heads, head_dim = x.shape
    M = batch * -(-length // chunk_size)
    acc = torch.promote_types(x.dtype, torch.float32)

    def new(*shape):
        return x.new_empty(shape, dtype=acc)

    state = (heads, head_dim, B.shape[3])
    steps = (M, heads, chunk_size)
    return (
        new(*steps),
        new(*steps),
        new(M, heads),
        new(M, *state),
        new(M, heads),
        new(batch, heads),
        new(batch, *state),
    )


@torch.library.custom_op("plait::ssd_finish", mutates_args=())
def finish(
    x_BLHP: Tensor,
    dt_MHQ: Tensor,
    log_decay_MHQ: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    entering_MHPN: Tensor,
    prefix_MH: Tensor,
    initial_BHPN: Tensor | None,
    documents_BL: Tensor | None,
) -> Tensor:
    """Stage 4: y (B, L, H, P) from the tokens of a chunk and from the state that enters it."""
    return _form(x_BLHP).finish(
        x_BLHP,
        dt_MHQ,
        log_decay_MHQ,
        B_BLGN,
        C_BLGN,
        D_H,
        entering_MHPN,
        prefix_MH,
        initial_BHPN,
        documents_BL,
    )


@finish.register_fake
def _(x, dt, log_decay, B, C, D, entering, prefix, initial, documents):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("plait::ssd_finish_backward", mutates_args=())
def finish_backward(
    grad_y_BLHP: Tensor,
    x_BLHP: Tensor,
    dt_MHQ: Tensor,
    log_decay_MHQ: Tensor,
    decay_MH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    entering_MHPN: Tensor,
    prefix_MH: Tensor,
    initial_BHPN: Tensor | None,
    documents_BL: Tensor | None,
    send: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients that need no state's gradient from beyond the shard.

    Returns:
        grad_C (B, L, G, N); grad_D (H,); sent (B, H, P, N), the gradient of the state that enters the shard,
        empty unless `send`; and the form's own, for `begin_backward`.
    """
    return _form(x_BLHP).finish_backward(
        grad_y_BLHP,
        x_BLHP,
        dt_MHQ,
        log_decay_MHQ,
        decay_MH,
        B_BLGN,
        C_BLGN,
        D_H,
        entering_MHPN,
        prefix_MH,
        initial_BHPN,
        documents_BL,
        send,
    )


@finish_backward.register_fake
def _(
    grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, documents, send
):  # fmt: skip
    grad_D = dt.new_empty(x.shape[2])
    sent = dt.new_empty((x.shape[0], *entering.shape[1:]) if send else (0,))
    return C.new_empty(C.shape), grad_D, sent, _form(x).kept(x, dt, B, entering)


@torch.library.custom_op("plait::ssd_begin_backward", mutates_args=())
def begin_backward(
    kept: list[Tensor],
    grad_final_BHPN: Tensor,
    grad_y_BLHP: Tensor,
    x_BLHP: Tensor,
    dt_raw_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_MHQ: Tensor,
    log_decay_MHQ: Tensor,
    decay_MH: Tensor,
    entering_MHPN: Tensor,
    prefix_MH: Tensor,
    total_BH: Tensor,
    initial_BHPN: Tensor | None,
    documents_BL: Tensor | None,
    dt_low: float,
    dt_high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The other gradients, from what `finish_backward` kept and the gradient of the state leaving the shard.

    Returns:
        grad_x (B, L, H, P), grad_dt (B, L, H) of the raw steps, grad_A (H,), grad_B (B, L, G, N),
        grad_dt_bias (H,), grad_initial (B, H, P, N).
    """
    return _form(x_BLHP).begin_backward(
        kept,
        grad_final_BHPN,
        grad_y_BLHP,
        x_BLHP,
        dt_raw_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        D_H,
        dt_bias_H,
        dt_MHQ,
        log_decay_MHQ,
        decay_MH,
        entering_MHPN,
        prefix_MH,
        total_BH,
        initial_BHPN,
        documents_BL,
        dt_low,
        dt_high,
    )


@begin_backward.register_fake
def _(kept, grad_final, grad_y, x, dt_raw, A, B, C, D, dt_bias, dt, *args):
    def of(tensor, dtype):
        return tensor.new_empty(tensor.shape, dtype=dtype)

    grad_A = of(A, dt.dtype)
    return (
        of(x, x.dtype),
        of(dt_raw, dt_raw.dtype),
        grad_A,
        of(B, B.dtype),
        torch.empty_like(grad_A),
        torch.empty_like(grad_final),
    )
