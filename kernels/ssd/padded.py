"""SSD's operators in PyTorch: `eager.py`'s stages, on sequences filled up to whole chunks.

The padding is at the end, with dt = 0: it changes no state, and belongs to the last document so that the
final state passes through it.

Shapes as in `operators.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager

__all__ = ["begin", "begin_backward", "finish", "finish_backward", "kept"]


def begin(x, dt, A, B, dt_bias, documents, dt_low, dt_high, chunk_size):
    acc = torch.promote_types(x.dtype, torch.float32)
    Q = chunk_size
    steps = F.softplus(_biased(dt, dt_bias, acc)).clamp_(dt_low, dt_high)
    steps = _fill(steps, Q)
    steps = steps.view(-1, Q, steps.shape[2]).transpose(1, 2).contiguous()
    log_decay, decay, states = eager.chunk_state(
        _fill(x, Q), steps, A.to(acc), _fill(B, Q), _fill_documents(documents, Q), Q
    )
    return steps, log_decay, decay, *eager.state_scan(decay, states, x.shape[0])


def finish(x, dt, log_decay, B, C, D, entering, prefix, initial, documents):
    Q = dt.shape[2]
    y = eager.chunk_output(
        _fill(x, Q),
        dt,
        log_decay,
        _fill(B, Q),
        _fill(C, Q),
        D,
        entering,
        prefix,
        initial,
        _fill_documents(documents, Q),
    )
    return y[:, : x.shape[1]].contiguous()


def finish_backward(
    grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, documents, send
):  # fmt: skip
    Q, length = dt.shape[2], x.shape[1]
    grad_x, grad_dt, grad_log_decay, grad_B, grad_C, grad_D, grad_entering = eager.chunk_output_backward(
        _fill(grad_y.contiguous(), Q),
        _fill(x, Q),
        dt,
        log_decay,
        _fill(B, Q),
        _fill(C, Q),
        D,
        entering,
        prefix,
        initial,
        _fill_documents(documents, Q),
    )
    sent = dt.new_empty(0)
    if send:
        batch = x.shape[0]
        reach = torch.exp(prefix.view(batch, -1, prefix.shape[1]))
        sent = torch.einsum("bch,bchpn->bhpn", reach, grad_entering.view(batch, -1, *entering.shape[1:]))
    kept = [grad_x, grad_dt, grad_log_decay, grad_B, grad_entering]
    return grad_C[:, :length].contiguous().to(C.dtype), grad_D, sent, kept


def kept(x, dt, B, entering):
    """Tensors like those that `finish_backward` keeps."""
    batch, whole = x.shape[0], dt.shape[0] // x.shape[0] * dt.shape[2]
    grad_x = dt.new_empty(batch, whole, *x.shape[2:])
    grad_B = dt.new_empty(batch, whole, *B.shape[2:])
    return [grad_x, torch.empty_like(dt), torch.empty_like(dt), grad_B, torch.empty_like(entering)]


def begin_backward(
    kept, grad_final, grad_y, x, dt_raw, A, B, C, D, dt_bias, dt, log_decay, decay, entering, prefix, total,
    initial, documents, dt_low, dt_high,
):  # fmt: skip
    grad_x, grad_dt, grad_log_decay, grad_B, grad_entering = kept
    Q, length, acc = dt.shape[2], x.shape[1], dt.dtype
    grad_states, grad_decay, grad_initial = eager.state_scan_backward(
        grad_entering, grad_final, decay, entering, prefix, initial
    )
    grad_x, grad_B, grad_steps, grad_A = eager.chunk_state_backward(
        grad_states,
        grad_decay,
        _fill(x, Q),
        dt,
        A.to(acc),
        log_decay,
        _fill(B, Q),
        _fill_documents(documents, Q),
        grad_x,
        grad_dt,
        grad_log_decay,
        grad_B,
    )
    biased = _biased(dt_raw, dt_bias, acc)
    slope = torch.sigmoid(biased)
    if dt_low > 0 or dt_high < math.inf:
        step = F.softplus(biased)
        slope.mul_((step >= dt_low) & (step <= dt_high))
    grad_raw = grad_steps[:, :length] * slope
    return (
        grad_x[:, :length].contiguous(),
        grad_raw.to(dt_raw.dtype),
        grad_A,
        grad_B[:, :length].contiguous(),
        grad_raw.sum((0, 1)),
        grad_initial,
    )


def _biased(dt: Tensor, dt_bias: Tensor | None, acc: torch.dtype) -> Tensor:
    return dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)


def _fill(tensor_BLx: Tensor, Q: int) -> Tensor:
    padding = -tensor_BLx.shape[1] % Q
    return F.pad(tensor_BLx, (0, 0) * (tensor_BLx.dim() - 2) + (0, padding)) if padding else tensor_BLx


def _fill_documents(documents_BL: Tensor | None, Q: int) -> Tensor | None:
    if documents_BL is None or documents_BL.shape[1] % Q == 0:
        return documents_BL
    padding = -documents_BL.shape[1] % Q
    return torch.cat([documents_BL, documents_BL[:, -1:].expand(-1, padding)], dim=1)
