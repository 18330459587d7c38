"""States passed from chunk to chunk, where each chunk's own was made apart: forward, or with `REVERSE` the
gradients' way back.

Sizes: K chunks a sequence, H heads, S = P N elements of a state.
"""

import triton
import triton.language as tl

__all__ = ["passing_kernel"]


@triton.jit(do_not_specialize=["K"])
def passing_kernel(states, decay, edges, total, out, K, H, S, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """In `states` (M, H, S) each chunk's own becomes what those before it pass to it; `out` (B, H, S) is what
    leaves the last. `edges` (M, H) and `total` (B, H) are the log-decays to each chunk and to the end."""
    program = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(S, BLOCK)
    block, program = program % num_blocks, program // num_blocks
    h, row = program % H, program // H
    s = block * BLOCK + tl.arange(0, BLOCK)
    live = s < S
    passed = tl.zeros((BLOCK,), tl.float32)
    edge = 0.0
    for step in range(K):
        k = K - 1 - step if REVERSE else step
        m = row * K + k
        at = states + (m * H + h) * S + s
        own = tl.load(at, mask=live, other=0.0)
        tl.store(at, passed, mask=live)
        if block == 0:
            tl.store(edges + m * H + h, edge)
        log = tl.load(decay + m * H + h)
        passed = own + tl.where(log == float("-inf"), 0.0, tl.exp(log) * passed)
        edge += log
    tl.store(out + (row * H + h) * S + s, passed, mask=live)
    if block == 0:
        tl.store(total + row * H + h, edge)
