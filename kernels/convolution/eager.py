"""The causal depthwise convolution in torch operators: blocks of tokens, and the backward by hand.

A block passes through K multiply-adds, the activation and the cast while it lies in the cache. The
backward walks the blocks from the last to the first and recomputes the pre-activation, which is
cheaper than to store and load it.

Documents: a tap of reach j crosses the start s of a document from the tokens s-j … s-1. Taps are taken
in the order of their reach, so a token that one tap may not read, no later tap may: before tap j it is
enough to set the one token s-j to zero, in a copy. The transposed convolution mirrors this.
"""

# B batch (rows of a block), L length, C channels, K taps (the halo has K-1 tokens), S tokens of a
# block, J = S + K-1

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache_blocks import block_rows

__all__ = ["backward", "forward"]

# Batch row and column of the first token of each document in a block.
Starts = tuple[Tensor, Tensor]


def forward(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    halo_BKC: Tensor | None,
    document_ids_BL: Tensor | None,
    silu: bool,
) -> Tensor:
    """The output ``(B, L, C)``, contiguous, in x's dtype; the sums are at least fp32."""
    dtype = torch.promote_types(x_BLC.dtype, torch.float32)
    K = weight_CK.shape[1]
    taps_KC = weight_CK.t().to(dtype).contiguous()
    bias_C = None if bias_C is None else bias_C.to(dtype)
    starts_BL = _document_starts(document_ids_BL, K)
    y_BLC = x_BLC.new_empty(x_BLC.shape)
    for rows, spans in _blocks(x_BLC):
        for start, stop in spans:
            starts = _starts_within(starts_BL, rows, start + 1, stop + K - 1)
            window_BJC = _window(x_BLC, halo_BKC, rows, start, stop, K)
            u_BSC = _convolve(window_BJC, taps_KC, bias_C, starts)
            y_BLC[rows, start:stop] = F.silu(u_BSC, inplace=True) if silu else u_BSC
    return y_BLC


def backward(
    dy_BLC: Tensor,
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    halo_BKC: Tensor | None,
    document_ids_BL: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and halo, each in its own dtype; an absent one's is empty."""
    dtype = torch.promote_types(x_BLC.dtype, torch.float32)
    C, K = weight_CK.shape
    taps_KC = weight_CK.t().to(dtype).contiguous()
    wide_bias_C = None if bias_C is None else bias_C.to(dtype)
    dtaps_KC = torch.zeros_like(taps_KC)
    dbias_C = taps_KC.new_zeros(C)
    starts_BL = _document_starts(document_ids_BL, K)
    dx_BLC = x_BLC.new_empty(x_BLC.shape)
    dhalo_BKC = x_BLC.new_empty(0) if halo_BKC is None else halo_BKC.new_empty(halo_BKC.shape)
    for rows, spans in _blocks(x_BLC):
        # The gradient of the pre-activation at the K-1 tokens after the block; none after the last.
        after_BKC = taps_KC.new_zeros(x_BLC[rows].shape[0], K - 1, C)
        for start, stop in reversed(spans):
            starts = _starts_within(starts_BL, rows, start + 1, stop + K - 1)
            window_BJC = _window(x_BLC, halo_BKC, rows, start, stop, K)
            du_BJC = torch.cat([dy_BLC[rows, start:stop].to(dtype), after_BKC], 1)
            du_BSC = du_BJC[:, : stop - start]
            if silu:
                u_BSC = _convolve(window_BJC, taps_KC, wide_bias_C, starts)
                torch.ops.aten.silu_backward.grad_input(du_BSC, u_BSC, grad_input=du_BSC)
            dtaps_KC += _taps_gradient(du_BSC, window_BJC, K, starts)
            dbias_C += du_BSC.sum((0, 1))
            after_BKC = du_BJC[:, : K - 1].clone()
            starts = _starts_within(starts_BL, rows, start + K - 1, stop + 2 * (K - 1))
            dx_BLC[rows, start:stop] = _convolve_transposed(du_BJC, taps_KC, starts)
        if halo_BKC is not None:
            # The halo is one more block, [-(K-1), 0), whose own outputs are not of this sequence.
            starts = _starts_within(starts_BL, rows, 0, 2 * (K - 1))
            du_BJC = F.pad(after_BKC, (0, 0, K - 1, 0))
            dhalo_BKC[rows] = _convolve_transposed(du_BJC, taps_KC, starts)
    dweight_CK = dtaps_KC.t().to(weight_CK.dtype).contiguous()
    dbias_C = x_BLC.new_empty(0) if bias_C is None else dbias_C.to(bias_C.dtype)
    return dx_BLC, dweight_CK, dbias_C, dhalo_BKC


def _blocks(x_BLC: Tensor) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Blocks of batch rows, each with the spans of tokens to take one after the other."""
    B, L, C = x_BLC.shape
    tokens = block_rows(L, C, x_BLC.device)
    rows = block_rows(B, tokens * C, x_BLC.device)
    spans = [(start, min(start + tokens, L)) for start in range(0, L, tokens)]
    for first in range(0, B, rows):
        yield slice(first, min(first + rows, B)), spans


def _window(x_BLC: Tensor, halo_BKC: Tensor | None, rows: slice, start: int, stop: int, K: int) -> Tensor:
    """The tokens ``[start - (K-1), stop)`` in the dtype of the sums; the first of them from the halo."""
    dtype = torch.promote_types(x_BLC.dtype, torch.float32)
    missing = max(0, K - 1 - start)
    inside_BJC = x_BLC[rows, start - (K - 1) + missing : stop]
    if not missing:
        return inside_BJC.to(dtype)
    B, inside, C = inside_BJC.shape
    window_BJC = x_BLC.new_empty(B, missing + inside, C, dtype=dtype)
    window_BJC[:, :missing] = 0 if halo_BKC is None else halo_BKC[rows, start:]
    window_BJC[:, missing:] = inside_BJC
    return window_BJC


def _document_starts(document_ids_BL: Tensor | None, K: int) -> Tensor | None:
    """True at the first token of a document, with K-1 columns of False to either side."""
    if document_ids_BL is None:
        return None
    before_BL = F.pad(document_ids_BL[:, :-1], (1, 0))
    return F.pad(document_ids_BL != before_BL, (K - 1, K - 1))


def _starts_within(starts_BL: Tensor | None, rows: slice, first: int, last: int) -> Starts | None:
    """The starts in columns ``[first, last)``, counted from there; None where no document starts."""
    if starts_BL is None:
        return None
    row_N, column_N = starts_BL[rows, first:last].nonzero(as_tuple=True)
    return (row_N, column_N) if row_N.numel() else None


def _earlier(window_BJC: Tensor, K: int, starts: Starts | None) -> Iterator[Tensor]:
    """For j = 0 … K-1 the tokens j before the block's, zero where they are of another document.

    The starts are counted from the window's second column: before its first there is nothing to set.
    """
    J, C = window_BJC.shape[1:]
    S = J - (K - 1)
    if starts is not None:
        window_BJC = window_BJC.clone(memory_format=torch.contiguous_format)
    for j in range(K):
        if j and starts is not None:
            row_N, column_N = starts
            # The clamp lands on a column that an earlier tap has set.
            window_BJC.view(-1, C).index_fill_(0, row_N * J + (column_N + 1 - j).clamp_min(0), 0)
        yield window_BJC[:, K - 1 - j : K - 1 - j + S]


def _convolve(window_BJC: Tensor, taps_KC: Tensor, bias_C: Tensor | None, starts: Starts | None) -> Tensor:
    """The pre-activation of the block, in memory of its own."""
    K = taps_KC.shape[0]
    u_BSC = taps_KC.new_zeros(()) if bias_C is None else bias_C
    for j, x_BSC in enumerate(_earlier(window_BJC, K, starts)):
        tap_C = taps_KC[K - 1 - j]
        u_BSC = u_BSC.addcmul_(x_BSC, tap_C) if j else torch.addcmul(u_BSC, x_BSC, tap_C)
    return u_BSC


def _taps_gradient(du_BSC: Tensor, window_BJC: Tensor, K: int, starts: Starts | None) -> Tensor:
    sums = [(du_BSC * x_BSC).sum((0, 1)) for x_BSC in _earlier(window_BJC, K, starts)]
    return torch.stack(sums[::-1])


def _convolve_transposed(du_BJC: Tensor, taps_KC: Tensor, starts: Starts | None) -> Tensor:
    """The gradient at the block's tokens, from their own and the K-1 next pre-activations; spoils du."""
    K = taps_KC.shape[0]
    J, C = du_BJC.shape[1:]
    S = J - (K - 1)
    dx_BSC = du_BJC[:, :S] * taps_KC[-1]
    for j in range(1, K):
        if starts is not None:
            row_N, column_N = starts
            du_BJC.view(-1, C).index_fill_(0, row_N * J + (column_N + j - 1).clamp_max(J - 1), 0)
        dx_BSC.addcmul_(du_BJC[:, j : j + S], taps_KC[K - 1 - j])
    return dx_BSC
