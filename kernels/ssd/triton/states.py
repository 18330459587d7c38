"""Stages 1 and 2 of the forward: step sizes, log-decays, and the state that enters each chunk.

`states_kernel` walks over the chunks of a sequence with the state in registers where `FUSED`, and makes
each chunk's own state, from zero, where not: then `passing.passing_kernel` follows.

Within a chunk tokens are taken in blocks. A block decays the state by its own total and adds
``(w x)^T B`` with ``w_j = exp(s_end - s_j) dt_j``; a document that starts in it drops what came before.

Sizes: L tokens a sequence, K chunks a sequence, Q tokens a chunk, H heads, R heads a group, P head dim,
N state size.
"""

# Triton types what its operators return as widely as can be.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .tiles import documents_of, load_rows, product, running_sum, softplus

__all__ = ["states_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def states_kernel(
    x, dt_raw, A, B, bias, documents, dt, log_decay, decay, prefix, total, entering, final,
    dt_low, dt_high, L, K, Q, H, R,
    x_b, x_l, x_h, dt_b, dt_l, B_b, B_l, B_g,
    P: tl.constexpr, N: tl.constexpr, FUSED: tl.constexpr, DOCUMENTS: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    low: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    num_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p_first = (program % num_p).to(tl.int32) * BLOCK_P
    n_first = (program // num_p % num_n).to(tl.int32) * BLOCK_N
    program = program // (num_p * num_n)
    h = program % H
    if FUSED:
        row, chunk, chunks = program // H, 0, K
    else:
        row, chunk, chunks = program // H // K, (program // H % K).to(tl.int32), 1
    writes = (p_first == 0) & (n_first == 0)
    x += row * x_b + h * x_h
    B += row * B_b + h // R * B_g
    dt_raw += row * dt_b + h
    a = tl.load(A + h)
    offset = 0.0
    if BIAS:
        offset = tl.load(bias + h).to(tl.float32)

    p = p_first + tl.arange(0, BLOCK_P)
    n = n_first + tl.arange(0, BLOCK_N)
    in_tile = (p < P)[:, None] & (n < N)[None, :]
    in_state = p[:, None] * N + n[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    before_chunk = 0.0
    blocks = tl.cdiv(Q, BLOCK_Q)
    for step in range(chunks):
        k = chunk + step
        m = row * K + k
        live_tokens = tl.minimum(Q, L - k * Q)
        at_end = k * Q + Q - 1
        if FUSED:
            tl.store(entering + (m * H + h) * P * N + in_state, state, mask=in_tile)
            if writes:
                tl.store(prefix + m * H + h, before_chunk)
        sum_before = 0.0
        for block in range(blocks):
            q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            t = k * Q + q
            live = q < live_tokens
            raw = tl.load(dt_raw + t.to(tl.int64) * dt_l, mask=live, other=0.0).to(tl.float32) + offset
            steps = tl.minimum(tl.maximum(softplus(raw), dt_low), dt_high)
            steps = tl.where(live, steps, 0.0)

            # Where a block is not full, what follows belongs to the chunk's last document.
            here = tl.minimum(t, at_end)
            ids = documents_of(documents, row, here, L - 1, DOCUMENTS)
            id_start = documents_of(documents, row, k * Q + block * BLOCK_Q - 1, L - 1, DOCUMENTS)
            end = tl.minimum(k * Q + (block + 1) * BLOCK_Q - 1, at_end)
            id_end = documents_of(documents, row, end, L - 1, DOCUMENTS)
            sums = running_sum(steps * a, ids, BLOCK_Q, DOCUMENTS, False)
            sum_end = tl.sum(tl.where(q == block * BLOCK_Q + BLOCK_Q - 1, sums, 0.0), 0)
            weight = tl.exp(tl.minimum(sum_end - sums, 0.0)) * steps
            weight = tl.where(ids == id_end, weight, 0.0)
            continues = id_start == id_end
            running = tl.where(ids == id_start, sum_before + sums, sums)
            sum_before = tl.where(continues, sum_before + sum_end, sum_end)
            if writes:
                inside = q < Q
                tl.store(dt + (m * H + h) * Q + q, steps, mask=inside)
                tl.store(log_decay + (m * H + h) * Q + q, running, mask=inside)

            xs = load_rows(x, k * Q, q, x_l, live, p_first, P, BLOCK_P).to(tl.float32) * weight[:, None]
            Bs = load_rows(B, k * Q, q, B_l, live, n_first, N, BLOCK_N)
            state = state * tl.where(continues, tl.exp(sum_end), 0.0)
            state = product(tl.trans(xs.to(low)), Bs, state, low, MODE)
        id_before = documents_of(documents, row, k * Q - 1, L - 1, DOCUMENTS)
        id_last = documents_of(documents, row, at_end, L - 1, DOCUMENTS)
        whole = tl.where(id_before == id_last, sum_before, float("-inf"))
        if writes:
            tl.store(decay + m * H + h, whole)
        before_chunk += whole
        if not FUSED:
            tl.store(entering + (m * H + h) * P * N + in_state, state, mask=in_tile)
    if FUSED:
        tl.store(final + (row * H + h) * P * N + in_state, state, mask=in_tile)
        if writes:
            tl.store(total + row * H + h, before_chunk)
