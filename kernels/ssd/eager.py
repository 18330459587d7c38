"""SSD's stages in PyTorch, forward and backward by hand (arXiv 2405.21060, section 6).

Within a chunk and a document, ``s_t = sum of dt A up to t`` (`log_decay`), so a token j reaches a later
token i with weight ``exp(s_i - s_j)``. The sums restart at each document: what one document holds never
enters another's arithmetic, masked products included, since a masked factor is an exact zero.

The backward runs in reverse: `chunk_output_backward` does all that stays inside a chunk,
`state_scan_backward` passes the state's gradient from chunk to chunk, and `chunk_state_backward` adds
what comes through the states to the gradients that the first one began.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length, M chunks in
all (batch rows x chunks a row), m the chunks of one block. States, decays, dt and every accumulation
are at least fp32.
"""

import torch
from torch import Tensor

from ..products import product_dtype
from .layout import (
    Documents,
    blocks,
    by_group,
    by_head,
    chunked,
    decay_tile,
    entering_state,
    rows,
    state_by_group,
    within,
)

__all__ = [
    "chunk_output",
    "chunk_output_backward",
    "chunk_state",
    "chunk_state_backward",
    "state_scan",
    "state_scan_backward",
]


def chunk_state(
    x_BLHP: Tensor, dt_MHQ: Tensor, A_H: Tensor, B_BLGN: Tensor, documents_BL: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1: what each chunk does to a state that passes it.

    Args:
        dt_MHQ: step sizes, after bias, softplus and clamp.
        documents_BL: document ids; None is one document that continues the state entering.

    Returns:
        log_decay (M, H, Q), running within chunk and document; decay (M, H), the chunk's total, -inf
        where a document starts in the chunk; states (M, H, P, N), each chunk's from zero.
    """
    Q = chunk_size
    heads, head_dim = x_BLHP.shape[2:]
    groups, state_size = B_BLGN.shape[2:]
    acc = dt_MHQ.dtype
    x, B, dt = chunked(x_BLHP, Q), chunked(B_BLGN, Q), dt_MHQ
    marks = Documents(documents_BL, Q)

    log_decay = marks.running_sum(dt * A_H[:, None])
    decay = marks.chunk_decay(log_decay)
    weight = torch.exp((log_decay[..., -1:] - log_decay).clamp_(max=0)).mul_(dt)
    if marks.last is not None:
        weight.mul_(marks.last[:, None])
    states = dt.new_empty(x.shape[0], heads, head_dim, state_size)
    for m in blocks(x.shape[0], heads * Q * head_dim):
        weighted = x[m].to(acc) * weight[m].transpose(1, 2)[..., None]
        torch.matmul(
            by_group(weighted, groups).transpose(-1, -2),
            B[m].to(acc).transpose(1, 2),
            out=state_by_group(states[m], groups),
        )
    return log_decay, decay, states


def state_scan(decay_MH: Tensor, states_MHPN: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: pass the state from chunk to chunk, from zero.

    Returns:
        entering (M, H, P, N), the state that each chunk finds; prefix (M, H), the log-decay from the
        sequence's start to each chunk; total (B, H), the sequence's log-decay; final (B, H, P, N).
    """
    states = rows(states_MHPN, batch)
    decay = rows(decay_MH, batch)
    factor = torch.exp(decay)[..., None, None]
    entering = torch.empty_like(states)
    state = torch.zeros_like(states[:, 0])
    for k in range(states.shape[1]):
        entering[:, k] = state
        state = torch.addcmul(states[:, k], state, factor[:, k])
    sums = decay.cumsum(1)
    prefix = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    return entering.view_as(states_MHPN), prefix.reshape(decay_MH.shape), sums[:, -1].clone(), state


def chunk_output(
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
    """Stage 4: y (B, L, H, P) from the tokens of a chunk and from the state that enters it.

    The state entering is ``entering + exp(prefix) initial``; the sum is made on the fly.
    """
    heads, Q = log_decay_MHQ.shape[1:]
    head_dim, groups = x_BLHP.shape[3], B_BLGN.shape[2]
    acc, low = dt_MHQ.dtype, product_dtype(x_BLHP)
    x, B, C = chunked(x_BLHP, Q), chunked(B_BLGN, Q), chunked(C_BLGN, Q)
    marks = Documents(documents_BL, Q)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for m in blocks(x.shape[0], heads * Q * Q):
        xm, Cm = x[m].to(acc), C[m].to(acc).transpose(1, 2)
        CB = within(Cm @ B[m].to(acc).permute(0, 2, 3, 1), marks, m)
        tile = decay_tile(log_decay_MHQ[m])
        tile.view(-1, groups, heads // groups, Q, Q).mul_(CB.unsqueeze(2))
        # What ends in y, which is rounded to x's dtype, may be multiplied in it.
        inside = tile.to(low) @ (xm.transpose(1, 2) * dt_MHQ[m][..., None]).to(low)

        state = entering_state(entering_MHPN, prefix_MH, initial_BHPN, m).to(low)
        reach = marks.reach(log_decay_MHQ, m)
        out = (Cm.to(low) @ state_by_group(state, groups).transpose(-1, -2)).transpose(1, 2)
        out = out.reshape(-1, Q, heads, head_dim) * reach.transpose(1, 2)[..., None]
        out += inside.transpose(1, 2)
        y[m] = out if D_H is None else out.addcmul_(xm, D_H[:, None].to(acc))
    return y.view(x_BLHP.shape)


def chunk_output_backward(
    grad_y_BLHP: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `chunk_output`.

    Those of x, dt, log_decay and B are partial: `chunk_state_backward` adds the part that goes
    through the states. They are kept at the accumulation's precision until then.

    Returns:
        grad_x (B, L, H, P), grad_dt (M, H, Q), grad_log_decay (M, H, Q), grad_B (B, L, G, N),
        grad_C (B, L, G, N), grad_D (H,), grad_entering (M, H, P, N).
    """
    heads, Q = log_decay_MHQ.shape[1:]
    groups, acc, low = B_BLGN.shape[2], dt_MHQ.dtype, product_dtype(x_BLHP)
    repeat = heads // groups
    x, B, C = chunked(x_BLHP, Q), chunked(B_BLGN, Q), chunked(C_BLGN, Q)
    grad_y, dt = chunked(grad_y_BLHP, Q), dt_MHQ
    marks = Documents(documents_BL, Q)

    grad_x = torch.empty(x.shape, dtype=acc, device=x.device)
    grad_B = torch.empty(B.shape, dtype=acc, device=x.device)
    grad_C = torch.empty(B.shape, dtype=acc, device=x.device)
    grad_dt, grad_log_decay = torch.empty_like(log_decay_MHQ), torch.empty_like(log_decay_MHQ)
    grad_D = dt_MHQ.new_zeros(heads)
    grad_entering = torch.empty_like(entering_MHPN)
    for m in blocks(x.shape[0], heads * Q * Q):
        gm = grad_y[m].to(acc)
        Bm, Cm = B[m].to(acc).transpose(1, 2), C[m].to(acc).transpose(1, 2)
        x_heads, g_heads = by_head(x[m], acc), by_head(gm, acc)

        # Inside the chunk. V is W = CB exp(s_i - s_j) dt_j (dy_i . x_j) without dt_j; its column sums
        # are dt's own gradient, and row minus column sums of that one tile are the log-decays'.
        similarity = g_heads @ x_heads.transpose(-1, -2)
        tile = decay_tile(log_decay_MHQ[m])
        CB = within(Cm @ Bm.transpose(-1, -2), marks, m)
        weights = (tile.view(-1, groups, repeat, Q, Q) * CB.unsqueeze(2)).view(tile.shape)
        # What only ends in a gradient of x's dtype may be multiplied in it; what reaches the step
        # sizes' and decays' gradients is not.
        grad_x_heads = weights.to(low).transpose(-1, -2) @ g_heads.to(low)
        V = weights.mul_(similarity)
        column_sums = V.sum(-2)
        row_sums = V.mul_(dt[m][..., None, :]).sum(-1)
        tile.mul_(similarity).mul_(dt[m][..., None, :])
        grad_CB = within(tile.view(-1, groups, repeat, Q, Q).sum(2), marks, m)

        # Through the state that enters the chunk.
        state = state_by_group(entering_state(entering_MHPN, prefix_MH, initial_BHPN, m), groups)
        reached = gm * marks.reach(log_decay_MHQ, m).transpose(1, 2)[..., None]
        from_state = by_group(reached, groups)
        through = (Cm @ state.transpose(-1, -2)).transpose(1, 2).reshape(gm.shape)
        torch.matmul(from_state.transpose(-1, -2), Cm, out=state_by_group(grad_entering[m], groups))

        grad_dt[m] = column_sums
        grad_log_decay[m] = row_sums - dt[m] * column_sums + (through * reached).sum(-1).transpose(1, 2)
        torch.mul(grad_x_heads.transpose(1, 2), dt[m].transpose(1, 2)[..., None], out=grad_x[m])
        if D_H is not None:
            grad_x[m].addcmul_(gm, D_H[:, None].to(acc))
            grad_D += similarity.diagonal(dim1=-2, dim2=-1).sum((0, 2))
        grad_B[m] = (grad_CB.transpose(-1, -2) @ Cm).transpose(1, 2)
        grad_C[m] = (grad_CB @ Bm + from_state.to(low) @ state.to(low)).transpose(1, 2)
    return (
        grad_x.view(x_BLHP.shape),
        grad_dt,
        grad_log_decay,
        grad_B.view(B_BLGN.shape),
        grad_C.view(C_BLGN.shape),
        grad_D,
        grad_entering,
    )


def state_scan_backward(
    grad_entering_MHPN: Tensor,
    grad_final_BHPN: Tensor,
    decay_MH: Tensor,
    entering_MHPN: Tensor,
    prefix_MH: Tensor,
    initial_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass the state's gradient from chunk to chunk, backwards, from that of the final state.

    Returns:
        grad_states (M, H, P, N), of each chunk's own state; grad_decay (M, H); grad_initial
        (B, H, P, N), of the state before the sequence.
    """
    batch = grad_final_BHPN.shape[0]
    grad_entering = rows(grad_entering_MHPN, batch)
    factor = torch.exp(rows(decay_MH, batch))
    entering = rows(entering_MHPN, batch)
    reach = torch.exp(rows(prefix_MH, batch))[..., None, None]
    grad_states = torch.empty_like(grad_entering)
    grad_decay = torch.empty_like(factor)
    grad = grad_final_BHPN
    for k in reversed(range(grad_states.shape[1])):
        grad_states[:, k] = grad
        state = entering[:, k]
        if initial_BHPN is not None:
            state = torch.addcmul(state, initial_BHPN, reach[:, k])
        grad_decay[:, k] = (grad * state).sum((-1, -2)) * factor[:, k]
        grad = torch.addcmul(grad_entering[:, k], grad, factor[:, k][..., None, None])
    return grad_states.view_as(entering_MHPN), grad_decay.reshape(decay_MH.shape), grad.clone()


def chunk_state_backward(
    grad_states_MHPN: Tensor,
    grad_decay_MH: Tensor,
    x_BLHP: Tensor,
    dt_MHQ: Tensor,
    A_H: Tensor,
    log_decay_MHQ: Tensor,
    B_BLGN: Tensor,
    documents_BL: Tensor | None,
    grad_x_BLHP: Tensor,
    grad_dt_MHQ: Tensor,
    grad_log_decay_MHQ: Tensor,
    grad_B_BLGN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add to the partial gradients of x, dt, log_decay and B what comes through the states.

    Returns:
        grad_x and grad_B, complete, in the dtypes of x and B; grad_dt (B, L, H), complete, of the clamped
        step sizes; grad_A (H,).
    """
    heads, Q = log_decay_MHQ.shape[1:]
    groups, acc, low = B_BLGN.shape[2], dt_MHQ.dtype, product_dtype(x_BLHP)
    x, B, dt = chunked(x_BLHP, Q), chunked(B_BLGN, Q), dt_MHQ
    grad_x, grad_B = chunked(grad_x_BLHP, Q), chunked(grad_B_BLGN, Q)
    marks = Documents(documents_BL, Q)
    new_x, new_B = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(B, memory_format=torch.contiguous_format),
    )
    new_dt, grad_log_decay = grad_dt_MHQ.clone(), grad_log_decay_MHQ.clone()
    weight = torch.exp((log_decay_MHQ[..., -1:] - log_decay_MHQ).clamp_(max=0))
    if marks.last is not None:
        weight.mul_(marks.last[:, None])
    for m in blocks(x.shape[0], heads * Q * x.shape[3]):
        xm, Bm = x[m].to(acc), B[m].to(acc).transpose(1, 2)
        weight_m = weight[m].transpose(1, 2)[..., None]
        dt_m = dt[m].transpose(1, 2)[..., None]
        grad_state = state_by_group(grad_states_MHPN[m], groups)
        grad_update = (Bm @ grad_state.transpose(-1, -2)).transpose(1, 2).reshape(xm.shape) * weight_m
        from_states = (grad_update * xm).sum(-1).transpose(1, 2)
        new_dt[m] += from_states
        passed = from_states * dt[m]
        grad_log_decay[m] -= passed
        grad_log_decay[m, :, -1] += passed.sum(-1)
        torch.add(grad_x[m], grad_update.mul_(dt_m), out=new_x[m])
        weighted = by_group(xm * (weight_m * dt_m), groups)
        torch.add(grad_B[m], (weighted.to(low) @ grad_state.to(low)).transpose(1, 2), out=new_B[m])
    # A chunk in which a document starts passes nothing on: its grad_decay is zero.
    grad_log_decay[..., -1] += grad_decay_MH
    grad_steps = marks.running_sum_backward(grad_log_decay)
    grad_A = (grad_steps * dt).sum((0, 2))
    grad_dt = torch.addcmul(new_dt, grad_steps, A_H[:, None].to(acc))
    grad_dt = grad_dt.transpose(1, 2).reshape(x_BLHP.shape[:3])
    return new_x.view(x_BLHP.shape), new_B.view(B_BLGN.shape), grad_dt, grad_A
