"""The backward's mirror of `states.py`: the gradient of the state that leaves each chunk, from zero.

What a chunk's outputs ask of the state that enters it is ``dY^T (exp(s) C)``, over the tokens of the document
that enters; it travels back to the chunk before, decayed, in registers where `FUSED`; where not,
`passing.passing_kernel` follows.

Sizes as in `states.py`.
"""

import triton
import triton.language as tl

from .tiles import documents_of, load_rows, load_vector, product

__all__ = ["grad_states_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def grad_states_kernel(
    grad_y, log_decay, decay, C, documents, leaving, suffix, total, out,
    L, K, Q, H, R,
    y_b, y_l, y_h, C_b, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, FUSED: tl.constexpr, DOCUMENTS: tl.constexpr,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    low: tl.constexpr = C.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    num_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p_first = (program % num_p).to(tl.int32) * BLOCK_P
    n_first = (program // num_p % num_n).to(tl.int32) * BLOCK_N
    program = program // (num_p * num_n)
    h = program % H
    if FUSED:
        row, chunk, chunks = program // H, K - 1, K
    else:
        row, chunk, chunks = program // H // K, (program // H % K).to(tl.int32), 1
    writes = (p_first == 0) & (n_first == 0)
    grad_y += row * y_b + h * y_h
    C += row * C_b + h // R * C_g

    p = p_first + tl.arange(0, BLOCK_P)
    n = n_first + tl.arange(0, BLOCK_N)
    in_tile = (p < P)[:, None] & (n < N)[None, :]
    in_state = p[:, None] * N + n[None, :]
    grad = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    after_chunk = 0.0
    for step in range(chunks):
        k = chunk - step
        m = row * K + k
        live_tokens = tl.minimum(Q, L - k * Q)
        id_before = documents_of(documents, row, k * Q - 1, L - 1, DOCUMENTS)
        if FUSED:
            tl.store(leaving + (m * H + h) * P * N + in_state, grad, mask=in_tile)
            whole = tl.load(decay + m * H + h)
            if writes:
                tl.store(suffix + m * H + h, after_chunk)
            after_chunk += whole
            grad = tl.where(whole == float("-inf"), 0.0, tl.exp(whole) * grad)
        for block in range(tl.cdiv(live_tokens, BLOCK_Q)):
            q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            live = q < live_tokens
            t = k * Q + q
            reach = tl.exp(load_vector(log_decay + (m * H + h) * Q, q, live))
            ids = documents_of(documents, row, t, L - 1, DOCUMENTS)
            reach = tl.where(ids == id_before, reach, 0.0)
            dy = load_rows(grad_y, k * Q, q, y_l, live, p_first, P, BLOCK_P).to(tl.float32) * reach[:, None]
            Cs = load_rows(C, k * Q, q, C_l, live, n_first, N, BLOCK_N)
            grad = product(tl.trans(dy.to(low)), Cs, grad, low, MODE)
        if not FUSED:
            tl.store(leaving + (m * H + h) * P * N + in_state, grad, mask=in_tile)
    if FUSED:
        tl.store(out + (row * H + h) * P * N + in_state, grad, mask=in_tile)
        if writes:
            tl.store(total + row * H + h, after_chunk)
