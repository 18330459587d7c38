"""The gradients of the raw steps, of A and of dt_bias, from row and column sums.

With ``ds_t`` the gradient of the log-decay s_t, a step's is the sum of ds from it to the end of its document
in the chunk, and of what the tokens before it passed to the chunk's end. A program does so for a chunk and
head, from the last tokens to the first.

Sizes as in `states.py`.
"""

# Triton types what its operators return as widely as can be.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .tiles import documents_of, load_vector, running_sum, sigmoid, softplus

__all__ = ["grad_steps_kernel"]


@triton.jit(do_not_specialize=["L", "K"])
def grad_steps_kernel(
    dt_raw, dt, A, bias, documents, direct, rows, columns, passed, at_end, through,
    grad_dt, grad_A, grad_bias,
    dt_low, dt_high, L, K, Q, H, blocks,
    dt_b, dt_l,
    PARTS_X: tl.constexpr, PARTS_C: tl.constexpr, DOCUMENTS: tl.constexpr, BIAS: tl.constexpr,
    COLUMNS_Q: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """grad_dt (B, L, H), of the raw steps; grad_A and grad_bias (M, H), each chunk's. COLUMNS_Q is the block
    of columns of `rows`."""
    program = tl.program_id(0).to(tl.int64)
    h, m = program % H, program // H
    row, start = m // K, (m % K).to(tl.int32) * Q
    a = tl.load(A + h)
    offset = 0.0
    if BIAS:
        offset = tl.load(bias + h).to(tl.float32)

    grad_a, grad_offset, after = 0.0, 0.0, 0.0
    pieces = tl.cdiv(Q, BLOCK_Q)
    for back in range(pieces):
        first = (pieces - 1 - back) * BLOCK_Q
        q = first + tl.arange(0, BLOCK_Q)
        inside = q < Q
        t = start + q
        live = q < tl.minimum(Q, L - start)
        own = tl.zeros((BLOCK_Q,), tl.float32)
        sums = tl.zeros((BLOCK_Q,), tl.float32)
        over = tl.zeros((BLOCK_Q,), tl.float32)
        before = 0.0
        for part in range(PARTS_X):
            virtual = program * PARTS_X + part
            own += load_vector(direct + virtual * Q, q, inside)
            sums -= load_vector(columns + virtual * Q, q, inside)
            sums += tl.where(q == Q - 1, tl.load(at_end + virtual), 0.0)
            at = passed + virtual * Q
            over += load_vector(at, q, inside)
            for piece in range(pieces - 1 - back):
                before += tl.sum(tl.load(at + piece * BLOCK_Q + tl.arange(0, BLOCK_Q)), 0)
            for block in range(blocks):
                written = inside & (q >= block * COLUMNS_Q)
                sums += load_vector(rows + (virtual * blocks + block) * Q, q, written)
        for part in range(PARTS_C):
            sums += load_vector(through + (program * PARTS_C + part) * Q, q, inside)
        steps = load_vector(dt + program * Q, q, inside)

        ids = documents_of(documents, row, t, L - 1, DOCUMENTS)
        id_after = documents_of(documents, row, start + first + BLOCK_Q, L - 1, DOCUMENTS)
        id_last = documents_of(documents, row, start + Q - 1, L - 1, DOCUMENTS)
        grad_log = running_sum(sums, ids, BLOCK_Q, DOCUMENTS, True) + tl.where(ids == id_after, after, 0.0)
        after = tl.sum(tl.where(q == first, grad_log, 0.0), 0)
        # Only tokens of the last document passed anything.
        strictly = q[:, None] > q[None, :]
        handed = before + tl.sum(tl.where(strictly, over[None, :], 0.0), 1)
        grad_log += tl.where(ids == id_last, handed, 0.0)
        grad_a += tl.sum(tl.where(inside, grad_log * steps, 0.0), 0)

        raw = (
            tl.load(dt_raw + row * dt_b + h + t.to(tl.int64) * dt_l, mask=live, other=0.0).to(tl.float32)
            + offset
        )
        unclamped = softplus(raw)
        grad = (own + grad_log * a) * sigmoid(raw)
        grad = tl.where(live & (unclamped >= dt_low) & (unclamped <= dt_high), grad, 0.0)
        tl.store(grad_dt + row * L * H + h + t.to(tl.int64) * H, grad.to(grad_dt.dtype.element_ty), mask=live)
        grad_offset += tl.sum(grad, 0)
    tl.store(grad_A + program, grad_a)
    tl.store(grad_bias + program, grad_offset)
