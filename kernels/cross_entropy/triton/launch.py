"""What calls the kernels."""

# T tokens, D width, M tokens of a chunk, V rows of the head on this rank

from collections.abc import Iterator

import torch
from torch import Tensor

from ...launching import launch, sizes_of
from ..eager import IGNORED
from . import kernels

__all__ = ["chunks", "reduce_logits", "write_gradient"]


def chunks(
    hidden_TD: Tensor, matrix_VD: Tensor, targets_T: Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of all tokens, a chunk at a time, their places, their hidden (M, D) and their logits (M, V).

    The logits may be overwritten, and are by those of the next chunk.
    """
    T = len(targets_T)
    buffer_MV = matrix_VD.new_empty(min(chunk_tokens, T), len(matrix_VD))
    for start in range(0, T, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, T))
        hidden_MD = hidden_TD[chunk]
        yield chunk, hidden_MD, torch.mm(hidden_MD, matrix_VD.t(), out=buffer_MV[: len(hidden_MD)])


def reduce_logits(logits_MV: Tensor, targets_M: Tensor, first: int) -> Tensor:
    """``(2, M)`` in fp32: the log-sum-exp of these rows, and the target's logit, -inf if it is elsewhere."""
    M, V = logits_MV.shape
    local_2M = logits_MV.new_empty(2, M, dtype=torch.float32)
    if M:
        sizes = sizes_of("cross_entropy_reduce", logits_MV.device, V=V)
        launch(
            kernels.reduce,
            (M,),
            logits_MV,
            targets_M.contiguous(),
            local_2M[0],
            local_2M[1],
            V,
            first,
            logits_MV.stride(0),
            num_warps=sizes["num_warps"],
            BLOCK=sizes["block"],
            STAGES=sizes["num_stages"],
        )
    return local_2M


def write_gradient(logits_MV: Tensor, targets_M: Tensor, lse_M: Tensor, z_loss: float, first: int) -> None:
    """Put the gradient of the logits in their place; that of a token without a target is zero."""
    M, V = logits_MV.shape
    if M:
        sizes = sizes_of("cross_entropy_gradient", logits_MV.device, V=V)
        launch(
            kernels.subtract_target,
            (M, -(-V // sizes["block"])),
            logits_MV,
            targets_M.contiguous(),
            lse_M.contiguous(),
            V,
            first,
            logits_MV.stride(0),
            z_loss,
            num_warps=sizes["num_warps"],
            IGNORED=IGNORED,
            BLOCK=sizes["block"],
        )
