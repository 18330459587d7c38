"""Windows and batches: the arrays that a sample becomes."""

from collections.abc import Mapping, Sequence

import numpy as np

from .plan import Plan
from .shards import Shard

__all__ = ["IGNORE", "batch", "window"]

IGNORE = -100
"""The target of a position that predicts nothing; torch's cross entropy ignores it by default."""


def window(
    plan: Plan,
    shards: Mapping[str, Shard],
    index: int,
    *,
    isolate_documents: bool = True,
    part: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of one sample, or of one part of it: P of its L tokens.

    The tokens of a part are all that is read; the documents of the whole window come from the index.
    So the parts of a window, one after the other, are the window.

    Args:
        plan: the order.
        shards: by prefix, at least those the sample lies in.
        index: the sample's number in the run.
        isolate_documents: number the documents and predict nothing across their borders; otherwise
            the window counts as one document.
        part: (lo, hi) for the tokens lo … hi - 1 of the window; all of it by default.

    Returns:
        tokens: int64 (P,).
        targets: int64 (P,), the next token, or IGNORE at a document's last and where a mask says that
            the next token does not count.
        document_ids: int32 (L,), of the whole window: 0 for its first document, then 1, ….
        positions: int32 (P,), from 0 at a document's first token in this window.

    Raises:
        ValueError: a part that is empty or not inside the window.
    """
    sample = plan.sample(index)
    length = sample.seq_len
    lo, hi = part or (0, length)
    if not 0 <= lo < hi <= length:
        raise ValueError(f"part ({lo}, {hi}) is empty or not inside a window of {length} tokens")
    shard = shards[sample.prefix]
    # One more for the last target, which for the last part lies past the window.
    stream = shard.tokens(sample.token + lo, hi - lo + 1)
    targets = stream[1:].copy()
    if shard.masked:
        targets[~shard.counted(sample.token + lo + 1, hi - lo)] = IGNORE
    places = np.arange(lo, hi, dtype=np.int32)
    document_ids = np.zeros(length, dtype=np.int32)
    if isolate_documents:
        starts = shard.starts(sample.token, length + 1)
        targets[starts[lo + 1 : hi + 1]] = IGNORE
        starts[0] = False
        np.cumsum(starts[:-1], out=document_ids)
        begins = np.append(0, np.flatnonzero(starts)).astype(np.int32)
        places -= begins[document_ids[lo:hi]]
    return {"tokens": stream[:-1], "targets": targets, "document_ids": document_ids, "positions": places}


def batch(
    plan: Plan,
    shards: Mapping[str, Shard],
    indices: Sequence[int],
    *,
    isolate_documents: bool = True,
    part: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """The windows of several samples, or the same part of each: the arrays of :func:`window`, stacked
    to (B, P), and ``document_ids`` to (B, L).

    Raises:
        ValueError: the samples lie in stages with different window lengths, or the part is empty or
            not inside a window.
    """
    windows = [
        window(plan, shards, index, isolate_documents=isolate_documents, part=part) for index in indices
    ]
    return {name: np.stack([arrays[name] for arrays in windows]) for name in windows[0]}
