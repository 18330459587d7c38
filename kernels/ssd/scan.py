"""The two autograd nodes over SSD's stages, and the exchange of states between them.

`begin` runs the stages up to the sequence's final state and launches the exchange; `finish` waits
for it and makes the output. What a caller computes in between hides the exchange, in the forward
and, since autograd runs nodes in reverse, in the backward too. Without an exchange `finish` does both
at once, in the one node of `whole.py`.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators, whole

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
    inputs: tuple[Tensor | None, ...] = ()
    kept: tuple[Tensor, ...] = ()


@dataclass
class Pending:
    """A scan between `begin` and `finish`: hand it to `finish`, once."""

    entering: Tensor | None
    """(M, H, P, N): the state entering each chunk, from zero; carries the gradient to `begin`. None without
    an exchange: then all is left to `finish`, and the tensors are the arguments."""
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
    link = _Link(exchange)
    chunk_size = min(chunk_size, x_BLHP.shape[1])
    if exchange is None:
        arguments = {
            "x": x_BLHP,
            "dt": dt_BLH,
            "A": A_H,
            "B": B_BLGN,
            "dt_bias": dt_bias_H,
            "initial": initial_state_BHPN,
            "documents": document_ids_BL,
            "constants": (*dt_limit, chunk_size),
        }
        return Pending(None, arguments, link, None)
    entering, x, dt, log_decay, decay, prefix, total, final, B = _Begin.apply(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        dt_bias_H,
        initial_state_BHPN,
        dt_limit,
        document_ids_BL,
        chunk_size,
        link,
    )
    initial = initial_state_BHPN.detach() if initial_state_BHPN is not None else None
    sent = final if initial is None else final + torch.exp(total)[..., None, None] * initial
    arrival = exchange(total, sent, reverse=False)
    tensors = {
        "x": x,
        "dt": dt,
        "log_decay": log_decay,
        "decay": decay,
        "prefix": prefix,
        "total": total,
        "final": final,
        "B": B,
        "initial": initial,
        "documents": document_ids_BL,
    }
    return Pending(entering, tensors, link, arrival)


def finish(pending: Pending, C_BLGN: Tensor, *, D_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Wait for the state entering this shard and compute the output; returns as :func:`ssd`.

    Raises:
        RuntimeError: `pending` was finished before.
    """
    if pending.finished:
        raise RuntimeError("this scan is finished; begin another one")
    pending.finished = True
    tensors = pending.tensors
    if pending.entering is None:
        first = (tensors[name] for name in ("x", "dt", "A", "B"))
        last = (tensors[name] for name in ("dt_bias", "initial", "documents"))
        return whole.ssd(*first, C_BLGN, D_H, *last, *tensors["constants"])[:2]
    initial = tensors["initial"]
    if pending.arrival is not None:
        arrived = pending.arrival()
        initial = arrived if initial is None else arrived + initial
    return _Finish.apply(
        pending.entering,
        C_BLGN,
        D_H,
        tensors["x"],
        tensors["dt"],
        tensors["log_decay"],
        tensors["decay"],
        tensors["prefix"],
        tensors["total"],
        tensors["final"],
        tensors["B"],
        initial,
        tensors["documents"],
        pending.link,
    )


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt_raw, A, B, dt_bias, initial, dt_limit, documents, Q, link):
        ctx.dt_limit, ctx.link = dt_limit, link
        dt, log_decay, decay, entering, prefix, total, final = operators.begin(
            x, dt_raw, A, B, dt_bias, documents, *dt_limit, Q
        )
        ctx.save_for_backward(
            x, dt_raw, A, B, dt_bias, dt, log_decay, decay, entering, prefix, total, documents
        )
        # Only `entering` carries a gradient; x and B come back as what `finish` reads.
        x, B = x.detach(), B.detach()
        ctx.mark_non_differentiable(x, dt, log_decay, decay, prefix, total, final, B)
        return entering, x, dt, log_decay, decay, prefix, total, final, B

    @staticmethod
    @once_differentiable
    def backward(ctx, *_):
        x, dt_raw, A, B, dt_bias, dt, log_decay, decay, entering, prefix, total, documents = ctx.saved_tensors
        link = ctx.link
        grad_y, grad_final, C, D, initial = link.inputs
        if link.incoming is not None:
            grad_final = link.incoming() + grad_final
        grad_x, grad_dt, grad_A, grad_B, grad_bias, grad_initial = operators.begin_backward(
            list(link.kept),
            grad_final,
            grad_y,
            x,
            dt_raw,
            A,
            B,
            C,
            D,
            dt_bias,
            dt,
            log_decay,
            decay,
            entering,
            prefix,
            total,
            initial,
            documents,
            *ctx.dt_limit,
        )
        link.inputs, link.kept, link.incoming = (), (), None
        return (
            grad_x,
            grad_dt,
            grad_A,
            grad_B,
            grad_bias.to(dt_bias.dtype) if dt_bias is not None else None,
            grad_initial if ctx.needs_input_grad[5] else None,
            *(None,) * 4,
        )


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, entering, C, D, x, dt, log_decay, decay, prefix, total, final, B, initial, documents, link
    ):
        ctx.link = link
        y = operators.finish(x, dt, log_decay, B, C, D, entering, prefix, initial, documents)
        if initial is not None:
            final = torch.addcmul(final, initial, torch.exp(total)[..., None, None])
        else:
            final = final.clone()
        ctx.save_for_backward(x, dt, log_decay, decay, B, C, D, entering, prefix, total, initial, documents)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, dt, log_decay, decay, B, C, D, entering, prefix, total, initial, documents = ctx.saved_tensors
        link = ctx.link
        send = link.exchange is not None
        grad_C, grad_D, sent, kept = operators.finish_backward(
            grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, documents, send
        )
        if link.exchange is not None:
            sent = torch.addcmul(sent, grad_final, torch.exp(total)[..., None, None])
            link.incoming = link.exchange(total, sent, reverse=True)
        link.inputs, link.kept = (grad_y, grad_final, C, D, initial), tuple(kept)
        # The edge to `begin` orders the two; what `begin` needs goes by the link.
        edge = torch.zeros((), dtype=entering.dtype, device=entering.device).expand(entering.shape)
        return edge, grad_C, grad_D if D is not None else None, *(None,) * 11
