"""Stage 4 of the forward: y from the tokens of a chunk and from the state that enters it.

A program makes y of a block of a chunk's tokens, for one head. C Bᵀ is made for each pair of blocks and
never leaves the registers; D x and the state from beyond the shard are added on the fly.

Sizes as in `states.py`.
"""

import triton
import triton.language as tl

from .tiles import documents_of, entering_tile, load_rows, load_vector, product, weights_tile

__all__ = ["output_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def output_kernel(
    x, dt, log_decay, B, C, D, entering, prefix, initial, documents, y,
    L, K, Q, H, R,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    low: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    num_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(Q, BLOCK_Q)
    # The longest rows of a chunk first: they are not what is waited for in the end.
    block = blocks - 1 - (program % blocks).to(tl.int32)
    p_first = (program // blocks % num_p).to(tl.int32) * BLOCK_P
    program = program // (blocks * num_p)
    h, m = program % H, program // H
    row, start = m // K, (m % K).to(tl.int32) * Q
    x += row * x_b + h * x_h
    B += row * B_b + h // R * B_g
    C += row * C_b + h // R * C_g
    dt += (m * H + h) * Q
    log_decay += (m * H + h) * Q
    live_tokens = tl.minimum(Q, L - start)

    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live_i = i < live_tokens
    t_i = start + i
    s_i = load_vector(log_decay, i, live_i)
    ids_i = documents_of(documents, row, t_i, L - 1, DOCUMENTS)
    id_before = documents_of(documents, row, start - 1, L - 1, DOCUMENTS)
    Ci = load_rows(C, start, i, C_l, live_i, 0, N, BLOCK_N)

    state = entering_tile(entering, prefix, initial, m, row, h, H, p_first, INITIAL, P, N, BLOCK_P, BLOCK_N)
    reach = tl.where(ids_i == id_before, tl.exp(s_i), 0.0)
    acc = product(Ci, tl.trans(state.to(low)), tl.zeros((BLOCK_Q, BLOCK_P), tl.float32), low, MODE)
    acc = acc * reach[:, None]
    for source in range(block + 1):
        j = source * BLOCK_Q + tl.arange(0, BLOCK_Q)
        live_j = j < live_tokens
        t_j = start + j
        s_j, dt_j = load_vector(log_decay, j, live_j), load_vector(dt, j, live_j)
        ids_j = documents_of(documents, row, t_j, L - 1, DOCUMENTS)
        Bj = load_rows(B, start, j, B_l, live_j, 0, N, BLOCK_N)
        xj = load_rows(x, start, j, x_l, live_j, p_first, P, BLOCK_P)
        tile = product(Ci, tl.trans(Bj), tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32), low, MODE)
        tile *= weights_tile(
            s_i[:, None], s_j[None, :], i[:, None], j[None, :], ids_i[:, None], ids_j[None, :], DOCUMENTS
        )
        acc = product(tile * dt_j[None, :], xj, acc, low, MODE)
    if HAS_D:
        xi = load_rows(x, start, i, x_l, live_i, p_first, P, BLOCK_P).to(tl.float32)
        acc += tl.load(D + h).to(tl.float32) * xi
    p = p_first + tl.arange(0, BLOCK_P)
    at = y + ((row * L + start) * H + h) * P + ((i * H * P)[:, None] + p[None, :])
    tl.store(at, acc.to(low), mask=live_i[:, None] & (p < P)[None, :])
