"""The gradients of x and B, and of each token's step and decay, from what a chunk's tokens ask of each other
and what the chunks after it ask of the state.

A program makes them for a block of a chunk's tokens j and one group, head after head. Row and column sums
are of the same fp32 tile ``V = CB exp(s_i - s_j) (dy_i . x_j)``: its column sums are dt_j's own gradient, and
rows of ``V dt_j`` minus columns those of the log-decays, which `grad_steps.py` puts together. A token's own
weight has no decay in it: the diagonal, which rows and columns share, is left out of both, so that nothing
cancels where decays are strong.

Virtual heads and sizes as in `grad_c.py`.
"""

# Triton types what its operators return as widely as can be.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .tiles import documents_of, entering_tile, load_rows, load_vector, product, weights_tile

__all__ = ["grad_x_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def grad_x_kernel(
    grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, leaving, suffix, grad_final,
    documents, grad_CB, grad_x, grad_B, direct, rows, columns, passed, at_end,
    L, K, M, Q, H, G, R, V,
    y_b, y_l, y_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_B (splits, B, L, G, N). With parts the blocks of P, direct (M, H, parts, Q) is dt's gradient but
    for its decays; rows (M, H, parts, blocks of Q, Q) row sums by block of columns, those before its own
    unwritten; columns (M, H, parts, Q) column sums, times dt; passed (M, H, parts, Q) what a token's part of
    the state leaving says of the decays after it; at_end (M, H, parts) what the state passing says of the
    whole's."""
    low: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    num_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(Q, BLOCK_Q)
    splits = R * num_p // V
    block = (program % blocks).to(tl.int32)
    split = (program // blocks % splits).to(tl.int32)
    program = program // (blocks * splits)
    g, m = program % G, program // G
    row, start = m // K, (m % K).to(tl.int32) * Q
    B += row * B_b + g * B_g
    C += row * C_b + g * C_g
    live_tokens = tl.minimum(Q, L - start)

    j = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live_j = j < live_tokens
    t_j = start + j
    ids_j = documents_of(documents, row, t_j, L - 1, DOCUMENTS)
    id_last = documents_of(documents, row, start + Q - 1, L - 1, DOCUMENTS)
    Bj = load_rows(B, start, j, B_l, live_j, 0, N, BLOCK_N)

    grad = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for v in range(split * V, split * V + V):
        h, part = g * R + v // num_p, v % num_p
        p_first = part * BLOCK_P
        xj = load_rows(x + row * x_b + h * x_h, start, j, x_l, live_j, p_first, P, BLOCK_P)
        s = log_decay + (m * H + h) * Q
        s_j = load_vector(s, j, live_j)
        dt_j = load_vector(dt + (m * H + h) * Q, j, live_j)
        to_end = tl.exp(tl.minimum(tl.load(s + Q - 1) - s_j, 0.0))
        to_end = tl.where(live_j & (ids_j == id_last), to_end, 0.0)

        # Through the state that leaves the chunk.
        virtual = (m * H + h) * num_p + part
        after = entering_tile(
            leaving, suffix, grad_final, m, row, h, H, p_first, True, P, N, BLOCK_P, BLOCK_N
        )
        asked = after.to(low)
        weighted = xj.to(tl.float32) * (to_end * dt_j)[:, None]
        grad = product(weighted, asked, grad, low, MODE)
        dx = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        dx = product(Bj, tl.trans(asked), dx, low, MODE) * to_end[:, None]
        own = tl.sum(dx * xj.to(tl.float32), 1)
        tl.store(passed + virtual * Q + j, own * dt_j, mask=j < Q)

        # Through the outputs of its own and the later blocks of the chunk.
        decayed = own * 0.0
        for target in range(block, blocks):
            i = target * BLOCK_Q + tl.arange(0, BLOCK_Q)
            live_i = i < live_tokens
            t_i = start + i
            ids_i = documents_of(documents, row, t_i, L - 1, DOCUMENTS)
            Ci = load_rows(C, start, i, C_l, live_i, 0, N, BLOCK_N)
            dy = load_rows(grad_y + row * y_b + h * y_h, start, i, y_l, live_i, p_first, P, BLOCK_P)
            s_i = load_vector(s, i, live_i)
            zero = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
            tile = product(Bj, tl.trans(Ci), zero, low, MODE)
            tile *= weights_tile(
                s_i[None, :], s_j[:, None], i[None, :], j[:, None], ids_i[None, :], ids_j[:, None], DOCUMENTS
            )
            dx = product(tile, dy, dx, low, MODE)
            tile *= product(xj, tl.trans(dy), zero, low, MODE)
            own += tl.sum(tile, 1)
            tile = tl.where(i[None, :] == j[:, None], 0.0, tile * dt_j[:, None])
            decayed += tl.sum(tile, 1)
            at = rows + (virtual * blocks + block) * Q
            tl.store(at + i, tl.sum(tile, 0), mask=i < Q)
        tl.store(direct + virtual * Q + j, own, mask=j < Q)
        tl.store(columns + virtual * Q + j, decayed, mask=j < Q)
        dx *= dt_j[:, None]
        if HAS_D:
            dy = load_rows(grad_y + row * y_b + h * y_h, start, j, y_l, live_j, p_first, P, BLOCK_P)
            dx += tl.load(D + h).to(tl.float32) * dy.to(tl.float32)
        p = p_first + tl.arange(0, BLOCK_P)
        at = grad_x + ((row * L + start) * H + h) * P + ((j * H * P)[:, None] + p[None, :])
        tl.store(at, dx.to(low), mask=live_j[:, None] & (p < P)[None, :])

        # Last, and by a few rows of the states at a time: whole ones would fill the registers.
        if block == 0:
            ends = 0.0
            whole = tl.load(decay + m * H + h)
            if whole != float("-inf"):
                for piece in range(tl.cdiv(tl.minimum(P - p_first, BLOCK_P), 16)):
                    p_piece = p_first + piece * 16
                    beyond = entering_tile(
                        leaving, suffix, grad_final, m, row, h, H, p_piece, True, P, N, 16, BLOCK_N
                    )
                    state = entering_tile(
                        entering, prefix, initial, m, row, h, H, p_piece, INITIAL, P, N, 16, BLOCK_N
                    )
                    ends += tl.sum(tl.sum(beyond * state, 1), 0)
                ends *= tl.exp(whole)
            tl.store(at_end + virtual, ends)

    for target in range(block, blocks):
        i = target * BLOCK_Q + tl.arange(0, BLOCK_Q)
        live_i = i < live_tokens
        Ci = load_rows(C, start, i, C_l, live_i, 0, N, BLOCK_N)
        at = grad_CB + ((split * M + m) * G + g) * Q * Q + (i[:, None] * Q + j[None, :])
        tile = tl.load(at, mask=live_i[:, None] & live_j[None, :], other=0.0)
        grad = product(tl.trans(tile), Ci, grad, low, MODE)
    n = tl.arange(0, BLOCK_N)
    begin = grad_B + (((split * (M // K) + row) * L + start) * G + g) * N
    at = begin + ((j * G * N)[:, None] + n[None, :])
    tl.store(at, grad.to(grad_B.dtype.element_ty), mask=live_j[:, None] & (n < N)[None, :])
