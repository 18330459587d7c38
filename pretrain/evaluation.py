"""Loss on held-out shards: in nats a token, in bits a byte, and by the place in the window.

Which windows are read is a pure function of the shards and `seq_len`: those that training's own
evaluation reads, in that order, whatever the batch size. Everything is a sum over targets, divided
once.

Shapes: B windows, L tokens of a window, T targets of a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.plan import Plan, open_blend
from ..data.tokenizer import Tokenizer
from ..data.window import IGNORE, batch
from ..errors import UserError
from ..kernels.cross_entropy import token_cross_entropy
from ..parallel.collectives import all_gather, sum_in_place
from ..parallel.fsdp import reshard
from ..parallel.vocabulary import vocabulary_shard
from .micro_batches import cut_batch
from .model import Hybrid

__all__ = ["Measured", "evaluate", "total"]


Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Sums over the windows that were read; the means are properties."""

    prefix: str
    windows: int
    loss_sum_L: Tensor
    """Nats, float64 on the CPU, for each place in the window."""
    targets_L: Tensor
    """Targets at each place, int64; a document's last token has none where documents are isolated."""
    bytes_per_token: float | None
    """Of the shards' text: their manifest's bytes and tokens, ends of documents included; without a
    manifest, what decoding the windows gives; without a tokenizer, None."""

    @property
    def targets(self) -> int:
        return int(self.targets_L.sum())

    @property
    def loss(self) -> float:
        """Mean over targets, in nats; 0 without any."""
        return float(self.loss_sum_L.sum()) / max(1, self.targets)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """What a byte of text costs, so that models with different tokenizers compare."""
        if self.bytes_per_token is None:
            return None
        return self.loss / math.log(2) / self.bytes_per_token


@torch.no_grad()
def evaluate(
    model: Hybrid,
    prefix: str,
    *,
    seq_len: int,
    windows: int,
    batch_size: int,
    isolate_documents: bool,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """The loss on the first windows of one epoch of held-out shards.

    Args:
        seq_len: tokens a window.
        windows: how many to read; all of the epoch where it has fewer.
        batch_size: windows a forward pass; changes rounding only.
        dtype: of the computation.
        tokenizer: counts the bytes of shards that have no manifest; None leaves them uncounted.
        progress: is told after each batch how many windows are done.

    Raises:
        UserError: shards that are missing, damaged, shorter than a window, or with ids that the model
            has no row for.
    """
    sources, shards = open_blend({prefix: 1.0})
    shard, mesh = shards[prefix], model.mesh
    plan = Plan.start(sources, seed=0, seq_len=seq_len)
    windows = min(windows, max(1, (shard.num_tokens - seq_len) // seq_len))
    loss_sum, targets = torch.zeros(seq_len, dtype=torch.float64), torch.zeros(seq_len, dtype=torch.int64)
    text_bytes = 0
    part = mesh.tokens(seq_len)
    for first in range(0, windows, batch_size):
        indices = range(first, min(first + batch_size, windows))
        # A rank without a window of its own computes one with the others, and counts nothing of it.
        mine = indices[mesh.rows(len(indices))]
        arrays = batch(plan, shards, mine or indices[:1], isolate_documents=isolate_documents, part=part)
        _check_ids(arrays, prefix, model.config.vocab_size)
        arrays = {name: array[: len(mine)] for name, array in arrays.items()}
        loss_BP = _losses(model, arrays, seq_len, isolate_documents, dtype)[: len(mine)]
        loss_sum[slice(*part)] += loss_BP.double().sum(0).cpu()
        targets[slice(*part)] += torch.from_numpy(arrays["targets"] != IGNORE).sum(0)
        if shard.manifest is None and tokenizer is not None:
            text_bytes += _text_bytes(tokenizer, arrays)
        if progress is not None:
            progress(indices.stop)
    reshard(model)
    loss_sum, targets = (
        sum_in_place(t.to(model.head_weight.device), mesh.axes["data"]).cpu() for t in (loss_sum, targets)
    )
    share = text_bytes / (windows * seq_len)
    if shard.manifest is not None:
        split = shard.manifest.splits[Path(prefix).name]
        share = split.text_bytes / split.tokens
    return Measured(prefix, windows, loss_sum, targets, share or None)


def total(parts: Sequence[Measured]) -> Measured:
    """All sources as one: each target counts once, each byte as its source counts it."""
    counted = [part.targets * part.bytes_per_token for part in parts if part.bytes_per_token is not None]
    all_targets = sum(part.targets for part in parts)
    return Measured(
        "total",
        sum(part.windows for part in parts),
        torch.stack([part.loss_sum_L for part in parts]).sum(0),
        torch.stack([part.targets_L for part in parts]).sum(0),
        sum(counted) / all_targets if len(counted) == len(parts) and all_targets else None,
    )


def _check_ids(arrays: Arrays, prefix: str, vocab_size: int) -> None:
    largest = max(arrays["tokens"].max(), arrays["targets"].max())
    if largest >= vocab_size:
        raise UserError(
            f"{prefix}: holds the id {largest}, and the model has {vocab_size} rows; "
            "name shards that were built with its tokenizer"
        )


def _text_bytes(tokenizer: Tokenizer, arrays: Arrays) -> int:
    """Bytes of UTF-8 in the windows' documents. A character that a window cuts counts as U+FFFD, 3."""
    count = 0
    for tokens_L, ids_L in zip(arrays["tokens"], arrays["document_ids"], strict=True):
        known_L = tokens_L < tokenizer.vocab_size
        for document in range(ids_L[-1] + 1):
            text = tokenizer.decode(tokens_L[known_L & (ids_L == document)].tolist())
            count += len(text.encode())
    return count


def _losses(model: Hybrid, arrays: Arrays, seq_len: int, isolate: bool, dtype: torch.dtype) -> Tensor:
    """Cross entropy of this rank's tokens (B, P), 0 where there is no target; at least fp32."""
    mesh, (rows, real) = model.mesh, arrays["tokens"].shape
    (micro,) = cut_batch(
        arrays,
        mesh,
        length=seq_len,
        rows=max(1, rows),
        size=None,
        device=model.head_weight.device,
        isolate_documents=isolate,
    )
    hidden_BLD, _ = model(micro.tokens, micro.packing, dtype)
    losses_T = token_cross_entropy(
        all_gather(hidden_BLD, mesh.tp, dim=1).flatten(0, 1),
        model.head_weight,
        micro.targets.flatten(),
        shard=vocabulary_shard(mesh, model.config.vocab_size),
    )
    return losses_T.view_as(micro.targets)[:, :real]
