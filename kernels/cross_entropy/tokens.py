"""Each token's own loss, without a gradient: what evaluation wants."""

# T tokens, D width, V rows of the head on this rank

import torch
from torch import Tensor

from . import eager, sharded
from .sharded import VocabularyShard

__all__ = ["token_cross_entropy"]


@torch.no_grad()
def token_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, shard: VocabularyShard | None = None
) -> Tensor:
    """The cross entropy of ``hidden @ weight.T`` against each target; 0 where the target is -100.

    Never holds more than a chunk's logits. The arguments are those of `linear_cross_entropy`, the shard's
    meaning too.

    Returns:
        ``(T,)``, fp32 at least, without a gradient; equal on every rank of a shard.

    Raises:
        ValueError: the shapes do not fit together or to the shard.
    """
    sharded.check_shapes("token_cross_entropy", hidden_TD, weight_VD, targets_T, shard)
    matrix_VD = weight_VD.to(hidden_TD.dtype)
    index_N = (targets_T != eager.IGNORED).nonzero()[:, 0]
    losses_T = hidden_TD.new_zeros(len(hidden_TD), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
    first = 0 if shard is None else shard.first
    chunk_tokens = eager.chunk_size(hidden_TD, sharded.most_rows(weight_VD, shard))
    for chunk, _, logits_MV in eager.chunks(hidden_TD, matrix_VD, index_N, chunk_tokens):
        index_M = index_N[chunk]
        local_2M = sharded.reduce_logits(logits_MV, targets_T[index_M], first)
        lse_M, target_M = sharded.exchange(local_2M, shard)
        losses_T[index_M] = lse_M - target_M
    return losses_T
