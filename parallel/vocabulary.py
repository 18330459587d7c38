"""The embedding and the head, whose rows are cut over `tp`.

Shapes: B batch, L tokens of this rank of `sp`, D width, V this rank's rows of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cross_entropy import VocabularyShard
from .collectives import gather_stacked, reduce_scatter
from .mesh import Mesh
from .placements import shard_range

__all__ = ["embed", "vocabulary_shard"]


def embed(
    tokens_BL: Tensor, weight_VD: Tensor, mesh: Mesh, num_rows: int, dtype: torch.dtype | None
) -> Tensor:
    """The rows of tokens, cut along the sequence over `tp`: (B, L / tp, D) in `dtype`.

    Args:
        tokens_BL: the same on every rank of `tp`.
        num_rows: of the vocabulary over all ranks.
        dtype: None is the weight's.
    """
    dtype = dtype or weight_VD.dtype
    if mesh.tp.size == 1:
        return F.embedding(tokens_BL, weight_VD).to(dtype)
    first, end = shard_range(num_rows, mesh.tp.size, mesh.tp.place)
    here_BL = (tokens_BL >= first) & (tokens_BL < end)
    rows_BLD = F.embedding((tokens_BL - first).clamp(0, end - first - 1), weight_VD).to(dtype)
    # One rank has the row and the others zeros, so that the sum is exact.
    return reduce_scatter(rows_BLD.masked_fill(~here_BL[..., None], 0), mesh.tp, dim=1)


def vocabulary_shard(mesh: Mesh, num_rows: int) -> VocabularyShard | None:
    """This rank's rows of the head, for the loss; None where they are all of them."""
    if mesh.tp.size == 1:
        return None
    first, _ = shard_range(num_rows, mesh.tp.size, mesh.tp.place)
    rows = -(-num_rows // mesh.tp.size)
    return VocabularyShard(first=first, rows=rows, gather=lambda x: gather_stacked(x, mesh.tp))
