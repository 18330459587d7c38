"""The kernels. T tokens, K experts a token, S rows sorted by expert, D channels; inverse is (T, K)."""

import triton
import triton.language as tl

__all__ = ["gather_sum", "scatter", "scatter_scaled"]


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
