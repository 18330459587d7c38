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
    matrix_VD = eager.to_multiply(weight_VD, hidden_TD)
    losses_T = hidden_TD.new_zeros(len(hidden_TD), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
    first = 0 if shard is None else shard.first
    chunk_tokens = eager.chunk_size(hidden_TD, sharded.most_rows(weight_VD, shard))
    form = sharded.form_for(hidden_TD)
    for index_M, _, logits_MV in form.chunks(hidden_TD, matrix_VD, targets_T, chunk_tokens):
        targets_M = targets_T[index_M]
        lse_M, target_M = sharded.exchange(form.reduce_logits(logits_MV, targets_M, first), shard)
        _, losses_T[index_M] = sharded.losses(lse_M, target_M, targets_M)
    return losses_T
