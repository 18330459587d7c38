"""The kernels; ``r = 1 / sqrt(mean(h²) + eps)``, ``h = x·silu(z)``: the formulas stand in eager.py."""

# T tokens, G groups, D channels of a group. A row is a group of a token: row = token G + group.

# What one constant of a kernel defines, the same constant reads.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

__all__ = ["add_products", "add_squares", "differentiate", "normalize"]


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _places(first, count, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block's rows of at most `count`, where their elements lie, and which of those there are."""
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row, column, row[:, None] * D + column[None], (row < count)[:, None] & (column < D)[None]


@triton.jit
def normalize(
    x,
    z,
    weight,
    y,
    r,
    total,
    rows,
    G,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Writes y, and r unless it is given. Where z is no gate but added to x, also their sum, rounded: the
    norm is of what is kept."""
    row, column, at, mask = _places(tl.program_id(0) * ROWS, rows, D, ROWS, BLOCK)
    h = _load(x, at, mask)
    if GATED:
        gate = _load(z, at, mask)
        h = h * gate * tl.sigmoid(gate)
    if ADDED:
        kept = (h + _load(z, at, mask)).to(total.dtype.element_ty)
        tl.store(total + at, kept, mask=mask)
        h = kept.to(tl.float32)
    if GIVEN:
        scale = tl.load(r + row, mask=row < rows, other=0.0)
    else:
        scale = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
        tl.store(r + row, scale, mask=row < rows)
    w = _load(weight, (row % G)[:, None] * D + column[None], mask)
    tl.store(y + at, (h * scale[:, None] * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def add_squares(x, z, squares, rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``Σ h²`` of each row."""
    row, _, at, mask = _places(tl.program_id(0) * ROWS, rows, D, ROWS, BLOCK)
    gate = _load(z, at, mask)
    h = _load(x, at, mask) * gate * tl.sigmoid(gate)
    tl.store(squares + row, tl.sum(h * h, 1), mask=row < rows)


@triton.jit
def add_products(dy, x, z, weight, r, products, rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``Σ dy·w·r·h`` of each row, in one group."""
    row, column, at, mask = _places(tl.program_id(0) * ROWS, rows, D, ROWS, BLOCK)
    gate = _load(z, at, mask)
    h = _load(x, at, mask) * gate * tl.sigmoid(gate)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.load(r + row, mask=row < rows, other=0.0)
    tl.store(products + row, tl.sum(_load(dy, at, mask) * w[None] * h, 1) * scale, mask=row < rows)


@triton.jit
def differentiate(
    dy,
    x,
    z,
    weight,
    r,
    means,
    dx,
    dz,
    dweight,
    T,
    G,
    D,
    tokens,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """`tokens` of one group a program; dweight is (programs, G, D), in fp32. Where x was a sum, z may be what
    else its gradient is made of."""
    group = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tokens
    end = tl.minimum(first + tokens, T)
    for start in range(0, tokens, ROWS):
        token = first + start + tl.arange(0, ROWS)
        row = token * G + group
        at = row[:, None] * D + column[None]
        mask = (token < end)[:, None] & (column < D)[None]
        scale = tl.load(r + row, mask=token < end, other=0.0)[:, None]
        h = _load(x, at, mask)
        if GATED:
            gate = _load(z, at, mask)
            sigmoid = tl.sigmoid(gate)
            ungated = h
            h = h * gate * sigmoid
        dyr = _load(dy, at, mask) * scale
        sums += dyr * h
        dh = dyr * w[None]
        if GIVEN:
            mean = tl.load(means + row, mask=token < end, other=0.0)
        else:
            mean = tl.sum(dh * h, 1) / D
        dh = dh - h * (mean[:, None] * scale * scale)
        if GATED:
            slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(dz + at, (dh * ungated * slope).to(dz.dtype.element_ty), mask=mask)
            dh = dh * gate * sigmoid
        if ADDED:
            dh += _load(z, at, mask)
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=mask)
    at = (tl.program_id(0).to(tl.int64) * G + group) * D + column
    tl.store(dweight + at, tl.sum(sums, 0), mask=column < D)
