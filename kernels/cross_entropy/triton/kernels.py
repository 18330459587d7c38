"""The kernels. M tokens of a chunk, V rows of the head on this rank, of which `first` is the first."""

import triton
import triton.language as tl

__all__ = ["reduce", "subtract_target"]


@triton.jit
def reduce(logits, targets, lse, at_target, V, first, row_stride, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Of one token the log-sum-exp, and the target's logit, -inf if the target is elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * row_stride
    greatest = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(greatest, tl.max(value, 0))
        # All -inf so far: their differences would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(greatest - shift) + tl.exp(value - shift)
        greatest = new
    tl.store(lse + token, greatest + tl.log(tl.sum(sums, 0)))
    place = tl.load(targets + token) - first
    here = (place >= 0) & (place < V)
    value = tl.load(logits + tl.where(here, place, 0)).to(tl.float32)
    tl.store(at_target + token, tl.where(here, value, float("-inf")))


@triton.jit
def subtract_target(
    logits, targets, lse, V, first, row_stride, z_loss, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the logits, ``p·(1 + 2·z_loss·lse)`` less one at the target, in their place."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + token * row_stride + column
    total = tl.load(lse + token)
    target = tl.load(targets + token)
    value = tl.load(at, mask=column < V, other=0.0).to(tl.float32)
    gradient = tl.exp(value - total) * (1.0 + 2.0 * z_loss * total)
    gradient = tl.where(column == target - first, gradient - 1.0, gradient)
    gradient = tl.where(target == IGNORED, 0.0, gradient)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < V)
