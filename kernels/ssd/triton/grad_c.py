"""The gradients of C and D, and what the backward keeps for those of B and of the decays.

A program makes dC of a block of a chunk's tokens for one group, head after head: the tile
``dCB = sum over heads of exp(s_i - s_j) dt_j (dy_i . x_j)`` is summed in registers, multiplied with B once,
and kept, in the inputs' dtype, for dB. So heads are summed in one order and nothing is added atomically.

A head dim wider than a block is several heads that share all but their columns of x and y: "virtual" heads.
Sizes as in `states.py`; V virtual heads a program, of R times the blocks of P a group.
"""

# Triton types what its operators return as widely as can be.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .tiles import documents_of, entering_tile, load_rows, load_vector, product, weights_tile

__all__ = ["grad_c_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def grad_c_kernel(
    grad_y, x, dt, log_decay, B, C, entering, prefix, initial, documents,
    grad_C, grad_D, grad_CB, through,
    L, K, M, Q, H, G, R, V,
    y_b, y_l, y_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_C (splits, B, L, G, N), grad_D (M, H, blocks of P, blocks of Q), grad_CB (splits, M, G, Q, Q),
    through (M, H, blocks of P, Q): what a token's output through the entering state says of its decay."""
    low: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    num_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(Q, BLOCK_Q)
    splits = R * num_p // V
    block = blocks - 1 - (program % blocks).to(tl.int32)
    split = (program // blocks % splits).to(tl.int32)
    program = program // (blocks * splits)
    g, m = program % G, program // G
    row, start = m // K, (m % K).to(tl.int32) * Q
    B += row * B_b + g * B_g
    C += row * C_b + g * C_g
    live_tokens = tl.minimum(Q, L - start)

    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live_i = i < live_tokens
    t_i = start + i
    ids_i = documents_of(documents, row, t_i, L - 1, DOCUMENTS)
    id_before = documents_of(documents, row, start - 1, L - 1, DOCUMENTS)
    Ci = load_rows(C, start, i, C_l, live_i, 0, N, BLOCK_N)

    grad = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for v in range(split * V, split * V + V):
        h, part = g * R + v // num_p, v % num_p
        p_first = part * BLOCK_P
        dy = load_rows(grad_y + row * y_b + h * y_h, start, i, y_l, live_i, p_first, P, BLOCK_P)
        state = entering_tile(
            entering, prefix, initial, m, row, h, H, p_first, INITIAL, P, N, BLOCK_P, BLOCK_N
        )
        reach = tl.exp(load_vector(log_decay + (m * H + h) * Q, i, live_i))
        reach = tl.where(ids_i == id_before, reach, 0.0)
        asked = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        asked = product(dy, state, asked, low, MODE) * reach[:, None]
        grad += asked
        at = through + ((m * H + h) * num_p + part) * Q
        tl.store(at + i, tl.sum(asked * Ci.to(tl.float32), 1), mask=i < Q)
        if HAS_D:
            xi = load_rows(x + row * x_b + h * x_h, start, i, x_l, live_i, p_first, P, BLOCK_P)
            own = tl.sum(tl.sum(dy.to(tl.float32) * xi.to(tl.float32), 1), 0)
            tl.store(grad_D + ((m * H + h) * num_p + part) * blocks + block, own)

    for source in range(block + 1):
        j = source * BLOCK_Q + tl.arange(0, BLOCK_Q)
        live_j = j < live_tokens
        t_j = start + j
        ids_j = documents_of(documents, row, t_j, L - 1, DOCUMENTS)
        tile = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
        for v in range(split * V, split * V + V):
            h, p_first = g * R + v // num_p, v % num_p * BLOCK_P
            dy = load_rows(grad_y + row * y_b + h * y_h, start, i, y_l, live_i, p_first, P, BLOCK_P)
            xj = load_rows(x + row * x_b + h * x_h, start, j, x_l, live_j, p_first, P, BLOCK_P)
            s = log_decay + (m * H + h) * Q
            s_i, s_j = load_vector(s, i, live_i), load_vector(s, j, live_j)
            dt_j = load_vector(dt + (m * H + h) * Q, j, live_j)
            alike = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
            alike = product(dy, tl.trans(xj), alike, low, MODE) * dt_j[None, :]
            tile += alike * weights_tile(
                s_i[:, None], s_j[None, :], i[:, None], j[None, :], ids_i[:, None], ids_j[None, :], DOCUMENTS
            )
        tile = tile.to(low)
        at = grad_CB + ((split * M + m) * G + g) * Q * Q + (i[:, None] * Q + j[None, :])
        tl.store(at, tile, mask=(i < Q)[:, None] & (j < Q)[None, :])
        Bj = load_rows(B, start, j, B_l, live_j, 0, N, BLOCK_N)
        grad = product(tile, Bj, grad, low, MODE)

    n = tl.arange(0, BLOCK_N)
    begin = grad_C + (((split * (M // K) + row) * L + start) * G + g) * N
    at = begin + ((i * G * N)[:, None] + n[None, :])
    tl.store(at, grad.to(grad_C.dtype.element_ty), mask=live_i[:, None] & (n < N)[None, :])
