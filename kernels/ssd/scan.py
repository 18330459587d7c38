"""The two autograd nodes over SSD's stages, and the exchange of states between them.

`begin` runs the stages up to the sequence's final state and launches the exchange; `finish` waits
for it and makes the output. What a caller computes in between hides the exchange, in the forward
and, since autograd runs nodes in reverse, in the backward too. On one rank `ssd` is both at once.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager import (
    chunk_output,
    chunk_output_backward,
    chunk_state,
    chunk_state_backward,
    state_scan,
    state_scan_backward,
)

__all__ = ["Exchange", "Pending", "begin", "finish", "ssd"]


class Exchange(Protocol):
    """How a shard's state reaches the shards of the same sequence.

    Called with the shard's total log-decay (B, H) and its final state from zero (B, H, P, N), it
    starts the communication and returns a function that waits for it and gives the state entering
    this shard: the exclusive prefix of ``(a1, F1) o (a2, F2) = (a1 + a2, exp(a2) F1 + F2)`` over the
    shards before. With ``reverse`` it gives the exclusive suffix over the shards after.
    """

    def __call__(
        self, log_decay_BH: Tensor, state_BHPN: Tensor, *, reverse: bool
    ) -> Callable[[], Tensor]: ...


@dataclass
class _Link:
    """What the backward of `finish` leaves for that of `begin`, beside autograd's own edge."""

    exchange: Exchange | None
    incoming: Callable[[], Tensor] | None = None
    entering_shard: Tensor | None = None
    partial: tuple[Tensor, ...] = ()


@dataclass
class Pending:
    """A scan between `begin` and `finish`: hand it to `finish`, once."""

    entering: Tensor
    """(M, H, P, N): the state entering each chunk, from zero; carries the gradient to `begin`."""
    length: int
    tensors: dict[str, Any]
    link: _Link
    arrival: Callable[[], Tensor] | None
    finished: bool = field(default=False)


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state_BHPN: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan over a whole sequence; `ssd_naive` says what it computes.

    Args:
        x_BLHP, B_BLGN, C_BLGN: float64, fp32 or bf16, one dtype for the three.
        dt_BLH: step sizes before bias and softplus.
        A_H: negative, at least fp32, like D and dt_bias.
        initial_state_BHPN: state before the first token, at least fp32; None is zero.
        document_ids_BL: non-decreasing integers; 0 continues from the initial state, each later
            document starts from zero. None is one document.
        chunk_size: tokens a chunk; changes rounding and speed only.

    Returns:
        y (B, L, H, P) in x's dtype and the state after the last token (B, H, P, N), at least fp32.
    """
    pending = begin(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        dt_bias_H=dt_bias_H,
        dt_limit=dt_limit,
        initial_state_BHPN=initial_state_BHPN,
        document_ids_BL=document_ids_BL,
        chunk_size=chunk_size,
    )
    return finish(pending, C_BLGN, D_H=D_H)


def begin(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    *,
    dt_bias_H: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state_BHPN: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
    chunk_size: int = 64,
    exchange: Exchange | None = None,
) -> Pending:
    """Compute the chunks' states and this shard's final state, and launch the exchange.

    Arguments are those of :func:`ssd`, for this shard. Under an exchange, only the first shard of a
    sequence takes an initial state.
    """
    length = x_BLHP.shape[1]
    Q = min(chunk_size, length)
    link = _Link(exchange)
    # Padding is at the end, with dt = 0: it changes no state, and belongs to the last document so that
    # the final state passes through it.
    padding = -length % Q
    documents = document_ids_BL
    if padding and documents is not None:
        documents = torch.cat([documents, documents[:, -1:].expand(-1, padding)], dim=1)
    entering, x, dt, log_decay, prefix, total, final, B = _Begin.apply(
        x_BLHP, dt_BLH, A_H, B_BLGN, dt_bias_H, initial_state_BHPN, dt_limit, documents, Q, padding, link
    )
    arrival = None
    initial = initial_state_BHPN.detach() if initial_state_BHPN is not None else None
    if exchange is not None:
        sent = final if initial is None else final + torch.exp(total)[..., None, None] * initial
        arrival = exchange(total, sent, reverse=False)
    tensors = {
        "x": x,
        "dt": dt,
        "log_decay": log_decay,
        "prefix": prefix,
        "total": total,
        "final": final,
        "B": B,
        "initial": initial,
        "documents": documents,
    }
    return Pending(entering, length, tensors, link, arrival)


def finish(pending: Pending, C_BLGN: Tensor, *, D_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Wait for the state entering this shard and compute the output; returns as :func:`ssd`.

    Raises:
        RuntimeError: `pending` was finished before.
    """
    if pending.finished:
        raise RuntimeError("this scan is finished; begin another one")
    pending.finished = True
    tensors = pending.tensors
    initial = tensors["initial"]
    if pending.arrival is not None:
        arrived = pending.arrival()
        initial = arrived if initial is None else arrived + initial
    y, state = _Finish.apply(
        pending.entering,
        C_BLGN,
        D_H,
        tensors["x"],
        tensors["dt"],
        tensors["log_decay"],
        tensors["prefix"],
        tensors["total"],
        tensors["final"],
        tensors["B"],
        initial,
        tensors["documents"],
        pending.link,
    )
    return y[:, : pending.length], state


def _pad(tensor_BLx: Tensor, padding: int) -> Tensor:
    return F.pad(tensor_BLx, (0, 0) * (tensor_BLx.dim() - 2) + (0, padding)) if padding else tensor_BLx


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt_raw, A, B, dt_bias, initial, dt_limit, documents, Q, padding, link):
        acc = torch.promote_types(x.dtype, torch.float32)
        ctx.dt_limit, ctx.padding, ctx.link, ctx.has_bias = dt_limit, padding, link, dt_bias is not None
        biased = dt_raw.to(acc) if dt_bias is None else dt_raw.to(acc) + dt_bias.to(acc)
        dt = _pad(F.softplus(biased).clamp_(*dt_limit), padding)
        ctx.length = x.shape[1]
        x, B, A = _pad(x, padding), _pad(B, padding), A.to(acc)
        log_decay, decay, states = chunk_state(x, dt, A, B, documents, Q)
        entering, prefix, total, final = state_scan(decay, states, x.shape[0])
        ctx.save_for_backward(x, dt, A, B, biased, log_decay, decay, entering, prefix, documents)
        ctx.dtypes = (dt_raw.dtype, dt_bias.dtype if dt_bias is not None else None)
        # Only `entering` carries a gradient; x and B come back as what `finish` reads, padded.
        x, B = x.detach(), B.detach()
        ctx.mark_non_differentiable(x, dt, log_decay, prefix, total, final, B)
        return entering, x, dt, log_decay, prefix, total, final, B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_entering, *_):
        x, dt, A, B, biased, log_decay, decay, entering, prefix, documents = ctx.saved_tensors
        link = ctx.link
        grad_x, grad_dt, grad_log_decay, grad_B, grad_final = link.partial
        if link.incoming is not None:
            grad_final = link.incoming() + grad_final
        grad_states, grad_decay, grad_initial = state_scan_backward(
            grad_entering, grad_final, decay, entering, prefix, link.entering_shard
        )
        link.partial, link.incoming, link.entering_shard = (), None, None
        grad_dt, grad_A = chunk_state_backward(
            grad_states,
            grad_decay,
            x,
            dt,
            A,
            log_decay,
            B,
            documents,
            grad_x,
            grad_dt,
            grad_log_decay,
            grad_B,
        )
        low, high = ctx.dt_limit
        length = ctx.length
        grad_x, grad_dt, grad_B = grad_x[:, :length], grad_dt[:, :length], grad_B[:, :length]
        slope = torch.sigmoid(biased)
        if low > 0 or high < math.inf:
            step = F.softplus(biased)
            slope.mul_((step >= low) & (step <= high))
        grad_dt = grad_dt * slope
        grad_bias = grad_dt.sum((0, 1)).to(ctx.dtypes[1]) if ctx.has_bias else None
        initial = grad_initial if ctx.needs_input_grad[5] else None
        return (
            grad_x.to(x.dtype),
            grad_dt.to(ctx.dtypes[0]),
            grad_A,
            grad_B.to(B.dtype),
            grad_bias,
            initial,
            *(None,) * 5,
        )


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entering, C, D, x, dt, log_decay, prefix, total, final, B, initial, documents, link):
        ctx.link = link
        ctx.length = C.shape[1]
        C = _pad(C, x.shape[1] - C.shape[1])
        y = chunk_output(x, dt, log_decay, B, C, D, entering, prefix, initial, documents)
        if initial is not None:
            final = torch.addcmul(final, initial, torch.exp(total)[..., None, None])
        else:
            final = final.clone()
        ctx.save_for_backward(x, dt, log_decay, B, C, D, entering, prefix, total, initial, documents)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, dt, log_decay, B, C, D, entering, prefix, total, initial, documents = ctx.saved_tensors
        link = ctx.link
        grad_x, grad_dt, grad_log_decay, grad_B, grad_C, grad_D, grad_entering = chunk_output_backward(
            grad_y.contiguous(), x, dt, log_decay, B, C, D, entering, prefix, initial, documents
        )
        if link.exchange is not None:
            batch = total.shape[0]
            reach = torch.exp(prefix.view(batch, -1, prefix.shape[1]))
            per_chunk = grad_entering.view(batch, -1, *grad_entering.shape[1:])
            sent = torch.einsum("bch,bchpn->bhpn", reach, per_chunk)
            sent = torch.addcmul(sent, grad_final, torch.exp(total)[..., None, None])
            link.incoming = link.exchange(total, sent, reverse=True)
        link.entering_shard = initial
        link.partial = (grad_x, grad_dt, grad_log_decay, grad_B, grad_final)
        grad_C = grad_C[:, : ctx.length].to(C.dtype)
        return grad_entering, grad_C, grad_D if D is not None else None, *(None,) * 10
