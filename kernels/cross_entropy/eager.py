"""The loss and its gradient in torch operators, a chunk of tokens at a time.

With p the softmax of a token's logits, the gradient of the logits is ``p·(1 + 2·z_loss·lse)``, less one
at the target. It takes the place of the logits while their chunk is there, so the logits are computed
once, and the backward has only to multiply by one number.
"""

# T tokens, D width, V vocabulary, N tokens that have a target, M tokens of a chunk, S tokens of a block

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cache_blocks import block_rows
from ..products import product_dtype

__all__ = [
    "IGNORED",
    "add_product",
    "backward",
    "chunk_size",
    "chunks",
    "forward",
    "log_sum_exp",
    "to_multiply",
    "with_target",
]

IGNORED = -100
# Of the logits of one chunk, in the dtype of hidden. Measured on 2 CPU cores with V = 32000, D = 512: half
# of it costs 2 to 10 %, an eighth 30 %, since the weight's gradient is read and written once a chunk. A GPU
# needs more rows to fill its products.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


def chunk_size(hidden_TD: Tensor, vocabulary: int) -> int:
    """The tokens of a chunk on this device."""
    budget = CHUNK_BYTES.get(hidden_TD.device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // (vocabulary * product_dtype(hidden_TD).itemsize))


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    z_loss: float,
    chunk_tokens: int,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(total, cross_entropy, dhidden, dweight)``, for an incoming gradient of one.

    dhidden is in hidden's dtype, dweight in the dtype of the sums; one that is not asked for is empty.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    matrix_VD = to_multiply(weight_VD, hidden_TD)
    index_N = with_target(targets_T)
    cross_entropy_N = hidden_TD.new_empty(len(index_N), dtype=dtype)
    lse_N = torch.empty_like(cross_entropy_N)
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape if with_hidden else (0,))
    dweight_VD = weight_VD.new_zeros(weight_VD.shape if with_weight else (0,), dtype=dtype)
    for chunk, index_M, hidden_MD, logits_MV in chunks(hidden_TD, matrix_VD, index_N, chunk_tokens):
        cross_entropy_N[chunk], lse_N[chunk] = _reduce_logits(
            logits_MV, targets_T[index_M], z_loss, with_hidden or with_weight
        )
        if with_hidden:
            dhidden_TD.index_copy_(0, index_M, (logits_MV @ matrix_VD).to(dhidden_TD.dtype))
        if with_weight:
            add_product(dweight_VD, logits_MV, hidden_MD)
    cross_entropy = cross_entropy_N.sum()
    return cross_entropy + z_loss * lse_N.square().sum(), cross_entropy, dhidden_TD, dweight_VD


def to_multiply(weight_VD: Tensor, hidden_TD: Tensor) -> Tensor:
    """The weight, rounded to hidden's dtype, in the dtype of their products."""
    return weight_VD.to(hidden_TD.dtype).to(product_dtype(hidden_TD))


def with_target(targets_T: Tensor) -> Tensor:
    """Which tokens have a target (N,); the host waits for how many."""
    return (targets_T != IGNORED).nonzero()[:, 0]


def chunks(
    hidden_TD: Tensor, matrix_VD: Tensor, index_N: Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of each chunk its place among the N, its tokens (M,), their hidden (M, D) and their logits (M, V).

    The logits may be overwritten, and are by those of the next chunk.
    """
    # One buffer for all chunks: fresh memory of this size would be mapped anew each time.
    buffer_MV = matrix_VD.new_empty(min(chunk_tokens, len(index_N)), len(matrix_VD))
    for start in range(0, len(index_N), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(index_N)))
        index_M = index_N[chunk]
        hidden_MD = hidden_TD[index_M].to(matrix_VD.dtype)
        yield chunk, index_M, hidden_MD, torch.mm(hidden_MD, matrix_VD.t(), out=buffer_MV[: len(hidden_MD)])


def backward(
    dtotal: Tensor, dhidden_TD: Tensor, dweight_VD: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The forward's gradients times ``dtotal``, the weight's rounded to its dtype only now."""
    return _scale(dhidden_TD, dtotal, dhidden_TD.dtype), _scale(dweight_VD, dtotal, weight_dtype)


def _reduce_logits(
    logits_MV: Tensor, targets_M: Tensor, z_loss: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The tokens' ``(cross_entropy, lse)``; with_gradient puts the gradient of the logits in their place."""
    dtype = torch.promote_types(logits_MV.dtype, torch.float32)
    M, V = logits_MV.shape
    rows = block_rows(M, V, logits_MV.device)
    cross_entropies, lses = [], []
    for start in range(0, M, rows):
        logits_SV = logits_MV[start : start + rows].to(dtype)
        target_S1 = targets_M[start : start + rows, None]
        p_SV = torch.softmax(logits_SV, -1)
        lse_S1 = log_sum_exp(logits_SV, p_SV)
        cross_entropies.append((lse_S1 - logits_SV.gather(-1, target_S1))[:, 0])
        lses.append(lse_S1[:, 0])
        if with_gradient:
            if z_loss:
                p_SV.mul_(1 + 2 * z_loss * lse_S1)
            p_SV.scatter_(-1, target_S1, p_SV.gather(-1, target_S1) - 1)
            logits_MV[start : start + rows] = p_SV
    return torch.cat(cross_entropies), torch.cat(lses)


def log_sum_exp(logits_SV: Tensor, p_SV: Tensor) -> Tensor:
    """``(S, 1)`` of the logits whose softmax is p."""
    # The greatest probability is at least 1/V, so its logarithm loses nothing; that of the target might.
    return logits_SV.amax(-1, keepdim=True) - p_SV.amax(-1, keepdim=True).log()


def add_product(dweight_VD: Tensor, dlogits_MV: Tensor, hidden_MD: Tensor) -> None:
    """``dweight += dlogitsᵀ · hidden``, added up in dweight's dtype."""
    if dweight_VD.dtype == hidden_MD.dtype:
        torch.addmm(dweight_VD, dlogits_MV.t(), hidden_MD, out=dweight_VD)
        return
    V, D = dweight_VD.shape
    # A product comes out in hidden's dtype; it is widened and added while it is in the cache. Longer blocks
    # than elsewhere, because these must feed a matrix product too.
    rows = 4 * block_rows(V, D, dweight_VD.device)
    for start in range(0, V, rows):
        product_SD = dlogits_MV[:, start : start + rows].t() @ hidden_MD
        dweight_VD[start : start + rows] += product_SD.to(dweight_VD.dtype)


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = gradient.new_empty(gradient.shape, dtype=dtype)
    rows = block_rows(len(gradient), gradient.shape[-1], gradient.device)
    for start in range(0, len(gradient), rows):
        scaled[start : start + rows] = gradient[start : start + rows].to(factor.dtype) * factor
    return scaled
