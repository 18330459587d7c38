"""The kernels: a block of elements a program, in fp32."""

import triton
import triton.language as tl

__all__ = ["differentiate_squared_relu", "differentiate_swiglu", "gate_by_silu", "square_positive"]


@triton.jit
def _places(count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def square_positive(x, y, count, BLOCK: tl.constexpr):
    at, mask = _places(count, BLOCK)
    positive = tl.maximum(tl.load(x + at, mask=mask).to(tl.float32), 0.0, tl.PropagateNan.ALL)
    tl.store(y + at, (positive * positive).to(y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_squared_relu(dy, x, dx, count, BLOCK: tl.constexpr):
    at, mask = _places(count, BLOCK)
    positive = tl.maximum(tl.load(x + at, mask=mask).to(tl.float32), 0.0, tl.PropagateNan.ALL)
    slope = 2.0 * positive
    tl.store(dx + at, (slope * tl.load(dy + at, mask=mask).to(tl.float32)).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def gate_by_silu(gate, up, y, count, BLOCK: tl.constexpr):
    at, mask = _places(count, BLOCK)
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_swiglu(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    at, mask = _places(count, BLOCK)
    d = tl.load(dy + at, mask=mask).to(tl.float32)
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=mask)
