"""The kernels. T tokens, K experts a token, S rows sorted by expert, D channels; inverse is (T, K)."""

import triton
import triton.language as tl

__all__ = ["choose", "gather_sum", "scatter", "scatter_scaled"]


@triton.jit
def choose(
    score,
    bias,
    expert,
    T,
    num_groups,
    size,
    top_k,
    top_k_groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """The best experts of some tokens, one after another; a number that is none is worse than all others."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, place = tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    number = group[:, None] * size + place[None]
    there = (group < num_groups)[:, None] & (place < size)[None]
    at = token[:, None, None] * (num_groups * size) + number[None]
    mask = (token < T)[:, None, None] & there[None]
    value = tl.load(score + at, mask=mask, other=float("-inf")).to(tl.float32)
    merit = value + tl.load(bias + number, mask=there, other=0.0).to(tl.float32)[None]
    merit = tl.where(merit == merit, merit, float("-inf"))
    if GROUPED:
        best = tl.max(merit, 2)
        if BLOCK > 1:
            first = place[None, None] == tl.argmax(merit, 2)[:, :, None]
            second = tl.max(tl.where(first, float("-inf"), merit), 2)
            best += tl.where(size > 1, second, 0.0)
        taken = tl.zeros([ROWS, GROUPS], tl.int32)
        for _ in range(top_k_groups):
            free = tl.where(taken > 0, float("-inf"), best)
            taken += (group[None] == tl.argmax(free, 1)[:, None]).to(tl.int32)
        merit = tl.where((taken > 0)[:, :, None], merit, float("-inf"))
    merit = tl.reshape(merit, [ROWS, GROUPS * BLOCK])
    column = tl.arange(0, GROUPS * BLOCK)
    for choice in range(top_k):
        index = tl.argmax(merit, 1)
        merit = tl.where(column[None] == index[:, None], float("-inf"), merit)
        chosen = index // BLOCK * size + index % BLOCK
        tl.store(expert + token * top_k + choice, chosen.to(tl.int64), mask=token < T)


@triton.jit
def scatter(x, inverse, rows, K, D, BLOCK: tl.constexpr):
    """Each token to its K rows: the token is read once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * D + column, mask=column < D)
    for choice in range(K):
        row = tl.load(inverse + token * K + choice)
        tl.store(rows + row * D + column, value, mask=column < D)


@triton.jit
def gather_sum(rows, weight, inverse, out, K, D, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """The sum of each token's K rows, by its weights if it has some."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(K):
        row = tl.load(inverse + token * K + choice)
        value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + token * K + choice).to(tl.float32)
        total += value
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def scatter_scaled(grad, rows, weight, inverse, grad_rows, grad_weight, K, D, BLOCK: tl.constexpr):
    """Each token's gradient, times its weights, to its K rows; and its products with what the rows were."""
    token = tl.program_id(0).to(tl.int64)
    for choice in range(K):
        row = tl.load(inverse + token * K + choice)
        scale = tl.load(weight + token * K + choice).to(tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        # One round where the block is as wide as the token, whose gradient the cache then keeps.
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            given = tl.load(grad + token * D + column, mask=column < D, other=0.0).to(tl.float32)
            value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
            products += given * value
            scaled = (given * scale).to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + row * D + column, scaled, mask=column < D)
        total = tl.sum(products, 0).to(grad_weight.dtype.element_ty)
        tl.store(grad_weight + token * K + choice, total)
