"""The launches at a production shape, for compiling ahead of time."""

import torch

from ...compiling import Compilation, Shape
from ...launching import recorded
from ..eager import CHUNK_BYTES
from .launch import reduce_logits, write_gradient

__all__ = ["compilations"]


def compilations(arch: str, shape: Shape) -> list[Compilation]:
    """The two passes over the logits of a GPU's chunk of tokens."""
    tokens = max(1, min(shape.tokens, CHUNK_BYTES["cuda"] // (2 * shape.V)))
    logits = torch.empty(tokens, shape.V, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with recorded(arch) as record:
        lse, _ = reduce_logits(logits, targets, 0)
        write_gradient(logits, targets, lse, 1e-4, 0)
    return record.compilations
