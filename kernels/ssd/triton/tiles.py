"""What the kernels share: products, sums that restart at documents, tiles in and out.

Where a tile begins is a 64-bit offset; within it, and for positions and document ids, 32 bits do, and take
half the registers. Widths (head dim, state size) are known to the compiler, so that a tile that is exactly as
wide as they are is not masked.
"""

# Triton types what its operators return as widely as can be.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

__all__ = [
    "documents_of",
    "entering_tile",
    "load_rows",
    "load_vector",
    "product",
    "running_sum",
    "sigmoid",
    "softplus",
    "weights_tile",
]


@triton.jit
def product(a, b, acc, LOW: tl.constexpr, MODE: tl.constexpr):
    """acc + a b, with both rounded to LOW and summed in fp32.

    MODE is the precision of an fp32 product, "tf32x3" or "ieee"; "interpret" is ieee where Triton interprets,
    whose products of bf16 are wrong: there the rounded numbers are multiplied in fp32, which is exact.
    """
    a, b = a.to(LOW), b.to(LOW)
    if MODE == "interpret":
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505, both are compiled otherwise
        return tl.dot(a, b, acc, input_precision=MODE)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32's last bits, also where exp(x) is far below 1: by the series of atanh."""
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)
    q = z * z
    series = q * (1.0 / 17.0) + 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    u = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def running_sum(steps, ids, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, REVERSE: tl.constexpr):
    """Sums along a vector, anew in each document: what lies before is masked, not subtracted."""
    if DOCUMENTS:
        q = tl.arange(0, BLOCK)
        sees = q[:, None] <= q[None, :] if REVERSE else q[:, None] >= q[None, :]
        sees = sees & (ids[:, None] == ids[None, :])
        return tl.sum(tl.where(sees, steps[None, :], 0.0), 1)
    else:  # noqa: RET505
        return tl.cumsum(steps, 0, reverse=REVERSE)


@triton.jit
def documents_of(documents, row, positions, last, DOCUMENTS: tl.constexpr):
    """The documents of positions of a batch row, those after the `last` taken for it; 0 without documents.

    A negative position is before the sequence, in document 0.
    """
    if DOCUMENTS:
        begin = documents + row * (last + 1)
        ids = tl.load(begin + tl.maximum(tl.minimum(positions, last), 0)).to(tl.int32)
        return tl.where(positions < 0, 0, ids)
    else:  # noqa: RET505
        return positions * 0


@triton.jit
def load_vector(base, positions, live):
    return tl.load(base + positions, mask=live, other=0.0)


@triton.jit
def load_rows(base, start, rows, stride, live, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a matrix with `stride` between rows, counted from row `start`, columns from `first`;
    zero beyond its edges. Within a chunk offsets take 31 bits, which launch.py sees to."""
    columns = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (first + columns < WIDTH)[None, :]
    at = base + (start.to(tl.int64) * stride + first) + ((rows * stride)[:, None] + columns[None, :])
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def entering_tile(
    states, edges, far, m, row, h, H, first, HAS_FAR: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_P, BLOCK_N) of ``states[m, h] + exp(edges[m, h]) far[row, h]``: a chunk's state, or its
    gradient, with what came from beyond the shard."""
    p = tl.arange(0, BLOCK_P)
    live = first + p < P
    tile = load_rows(states + (m * H + h) * P * N, first, p, N, live, 0, N, BLOCK_N)
    if HAS_FAR:
        beyond = load_rows(far + (row * H + h) * P * N, first, p, N, live, 0, N, BLOCK_N)
        tile += tl.exp(tl.load(edges + m * H + h)) * beyond
    return tile


@triton.jit
def weights_tile(s_to, s_from, to, source, documents_to, documents_from, DOCUMENTS: tl.constexpr):
    """exp(s_to - s_from) where the token `to` sees the token `source`: not later, and of its document."""
    sees = to >= source
    if DOCUMENTS:
        sees = sees & (documents_to == documents_from)
    return tl.where(sees, tl.exp(tl.minimum(s_to - s_from, 0.0)), 0.0)
