"""Prompts of any lengths in, ids out, a step at a time.

Shorter prompts are padded in front, and the padding is a document of its own: the kernels that train
on packed documents keep it apart exactly, so a row is what it would be alone, and all rows end at the
same place, where they go on together.

Shapes: B rows, L tokens of the longest prompt, D model width, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..model import Hybrid, Packing
from ..model.layers import exact
from .sampling import GREEDY, Sampler, Sampling

__all__ = ["collect", "decode"]

PADDING = 0
"""An id that every model has; no prompt sees it."""

Step = list[int | None]
"""The next id of each row; None where the row has ended."""


def decode(
    model: Hybrid,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    end_of_document: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Step]:
    """Continue prompts, all of them a token further at each step, until every row has ended.

    Args:
        prompts: ids, at least one a row.
        max_tokens: that a row gets at most.
        end_of_document: a row ends before this id; None lets rows end by `max_tokens` alone.
        vocab_size: ids from here on are never chosen, such as rows of the head that the tokenizer has
            no use for; None is the whole head.
        dtype: of the computation; None is that of the parameters.

    Raises:
        ValueError: no prompt, one without ids, or max_tokens < 1.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt without ids: a model says what follows a token, not what comes first")
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}, not at least 1")
    sampler = Sampler(sampling, prompts)
    return _steps(model, prompts, max_tokens, sampler, end_of_document, vocab_size, dtype)


def collect(steps: Iterable[Step]) -> list[list[int]]:
    """The ids after each prompt, as `decode` gives them; the end of a document is not among them."""
    rows = zip(*steps, strict=True)
    return [[token for token in row if token is not None] for row in rows]


def _steps(
    model: Hybrid,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler,
    end: int | None,
    vocab_size: int | None,
    dtype: torch.dtype | None,
) -> Iterator[Step]:
    tokens_BL, packing = pad(prompts, model.head_weight.device)
    capacity = tokens_BL.shape[1] + max_tokens
    hidden_BD, caches = model.prefill(tokens_BL, packing, capacity, dtype)
    positions_B = packing.positions_BL[:, -1]
    going = [True] * len(prompts)
    for left in reversed(range(max_tokens)):
        with torch.no_grad():
            next_B = sampler(exact(model.logits(hidden_BD)[:, :vocab_size]))
        ids = next_B.tolist()
        going = [still and token != end for still, token in zip(going, ids, strict=True)]
        yield [token if still else None for still, token in zip(going, ids, strict=True)]
        if not left or not any(going):
            return
        positions_B = positions_B + 1
        hidden_BD = model.step(next_B, positions_B, caches, dtype)


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Packing]:
    """Tokens (B, L), each row's prompt at its end, and the padding before it a document of its own."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    rows = [[PADDING] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    missing_B1 = longest - torch.tensor(lengths, device=device)[:, None]
    places_BL = torch.arange(longest, device=device) - missing_B1
    documents = (places_BL >= 0).int() if min(lengths) < longest else None
    return torch.tensor(rows, device=device), Packing(places_BL.clamp(min=0), documents)
