"""SSD's forward stages in PyTorch, as registered operators (arXiv 2405.21060, section 6).

Within a chunk and a document, ``s_t = sum of dt A up to t`` (`log_decay`), so a token j reaches a
later token i with weight ``exp(s_i - s_j)``. The sums restart at each document: what one document
holds never enters another's arithmetic, masked products included, since a masked factor is an exact
zero.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length, M chunks in
all (batch rows x chunks a row), m the chunks of one block. States, decays, dt and every accumulation
are at least fp32.
"""

import torch
from torch import Tensor

from .layout import (
    Documents,
    blocks,
    by_group,
    chunked,
    decay_tile,
    entering_state,
    rows,
    state_by_group,
    within,
)

__all__ = ["chunk_output", "chunk_state", "state_scan"]


@torch.library.custom_op("plait::ssd_chunk_state", mutates_args=())
def chunk_state(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, documents_BL: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1: what each chunk does to a state that passes it.

    Args:
        dt_BLH: step sizes, after bias, softplus and clamp.
        documents_BL: document ids; None is one document that continues the state entering.

    Returns:
        log_decay (M, H, Q), running within chunk and document; decay (M, H), the chunk's total, -inf
        where a document starts in the chunk; states (M, H, P, N), each chunk's from zero.
    """
    Q = chunk_size
    heads, head_dim = x_BLHP.shape[2:]
    groups, state_size = B_BLGN.shape[2:]
    acc = dt_BLH.dtype
    x, B, dt = chunked(x_BLHP, Q), chunked(B_BLGN, Q), chunked(dt_BLH, Q).transpose(1, 2)
    marks = Documents(documents_BL, Q)

    log_decay = marks.running_sum(dt * A_H[:, None])
    decay = marks.chunk_decay(log_decay)
    weight = torch.exp((log_decay[..., -1:] - log_decay).clamp_(max=0)).mul_(dt)
    if marks.last is not None:
        weight.mul_(marks.last[:, None])
    states = dt.new_empty(x.shape[0], heads, head_dim, state_size)
    for m in blocks(x.shape[0], heads * Q * head_dim):
        weighted = x[m].to(acc) * weight[m].transpose(1, 2)[..., None]
        products = by_group(weighted, groups).transpose(-1, -2) @ B[m].to(acc).transpose(1, 2)
        states[m] = products.view(states[m].shape)
    return log_decay, decay, states


@chunk_state.register_fake
def _(x_BLHP, dt_BLH, A_H, B_BLGN, documents_BL, chunk_size):
    batch, length, heads, head_dim = x_BLHP.shape
    M = batch * (length // chunk_size)
    return (
        dt_BLH.new_empty(M, heads, chunk_size),
        dt_BLH.new_empty(M, heads),
        dt_BLH.new_empty(M, heads, head_dim, B_BLGN.shape[3]),
    )


@torch.library.custom_op("plait::ssd_state_scan", mutates_args=())
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


@state_scan.register_fake
def _(decay_MH, states_MHPN, batch):
    heads, head_dim, state_size = states_MHPN.shape[1:]
    return (
        torch.empty_like(states_MHPN),
        torch.empty_like(decay_MH),
        decay_MH.new_empty(batch, heads),
        states_MHPN.new_empty(batch, heads, head_dim, state_size),
    )


@torch.library.custom_op("plait::ssd_chunk_output", mutates_args=())
def chunk_output(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
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
    acc = dt_BLH.dtype
    x, B, C = chunked(x_BLHP, Q), chunked(B_BLGN, Q), chunked(C_BLGN, Q)
    dt = chunked(dt_BLH, Q).transpose(1, 2)
    marks = Documents(documents_BL, Q)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for m in blocks(x.shape[0], heads * Q * Q):
        xm, Cm = x[m].to(acc), C[m].to(acc).transpose(1, 2)
        CB = within(Cm @ B[m].to(acc).permute(0, 2, 3, 1), marks, m)
        tile = decay_tile(log_decay_MHQ[m])
        tile.view(-1, groups, heads // groups, Q, Q).mul_(CB.unsqueeze(2))
        inside = tile @ (xm.transpose(1, 2) * dt[m][..., None])

        state = entering_state(entering_MHPN, prefix_MH, initial_BHPN, m)
        reach = marks.reach(log_decay_MHQ, m)
        out = (Cm @ state_by_group(state, groups).transpose(-1, -2)).transpose(1, 2)
        out = out.reshape(-1, Q, heads, head_dim) * reach.transpose(1, 2)[..., None]
        out += inside.transpose(1, 2)
        y[m] = out if D_H is None else out.addcmul_(xm, D_H[:, None].to(acc))
    return y.view(x_BLHP.shape)


@chunk_output.register_fake
def _(
    x_BLHP, dt_BLH, log_decay_MHQ, B_BLGN, C_BLGN, D_H, entering_MHPN, prefix_MH, initial_BHPN, documents_BL
):
    return torch.empty_like(x_BLHP, memory_format=torch.contiguous_format)
