"""Windows and batches: the arrays that a sample becomes."""

from collections.abc import Mapping, Sequence

import numpy as np

from .mixture import Plan
from .shards import Shard

__all__ = ["IGNORE", "batch", "window"]

IGNORE = -100
"""The target of a position that predicts nothing; torch's cross entropy ignores it by default."""


def window(
    plan: Plan, shards: Mapping[str, Shard], index: int, *, isolate_documents: bool = True
) -> dict[str, np.ndarray]:
    """The arrays of one sample.

    Args:
        plan: the order.
        shards: by prefix, at least those the sample lies in.
        index: the sample's number in the run.
        isolate_documents: number the documents and predict nothing across their borders; otherwise
            the window counts as one document.

    Returns:
        tokens: int64 (L,).
        targets: int64 (L,), the next token, or IGNORE at a document's last and where a mask says that
            the next token does not count.
        document_ids: int32 (L,), 0 for the window's first document, then 1, ….
        positions: int32 (L,), from 0 at a document's first token in this window.
    """
    sample = plan.sample(index)
    length = sample.seq_len
    shard = shards[sample.prefix]
    stream, starts = shard.read(sample.token, length + 1)
    tokens, targets = stream[:-1].copy(), stream[1:].copy()
    if shard.masked:
        targets[~shard.counted(sample.token + 1, length)] = IGNORE
    places = np.arange(length, dtype=np.int32)
    if not isolate_documents:
        return {
            "tokens": tokens,
            "targets": targets,
            "document_ids": np.zeros(length, dtype=np.int32),
            "positions": places,
        }
    targets[starts[1:]] = IGNORE
    starts[0] = False
    begins = np.maximum.accumulate(np.where(starts[:-1], places, 0))
    return {
        "tokens": tokens,
        "targets": targets,
        "document_ids": np.cumsum(starts[:-1], dtype=np.int32),
        "positions": (places - begins).astype(np.int32),
    }


def batch(
    plan: Plan, shards: Mapping[str, Shard], indices: Sequence[int], *, isolate_documents: bool = True
) -> dict[str, np.ndarray]:
    """The windows of several samples, each array stacked to (B, L).

    Raises:
        ValueError: the samples lie in stages with different window lengths.
    """
    windows = [window(plan, shards, index, isolate_documents=isolate_documents) for index in indices]
    return {name: np.stack([arrays[name] for arrays in windows]) for name in windows[0]}
