"""A model's own continuation of a text."""

from collections.abc import Sequence

import torch

from .model import Hybrid, Packing

__all__ = ["continue_greedily"]


@torch.no_grad()
def continue_greedily(
    model: Hybrid, prompt: Sequence[int], num_tokens: int, *, dtype: torch.dtype | None = None
) -> list[int]:
    """The prompt and the `num_tokens` likeliest ids after it, each by a forward over all before it."""
    device = model.head_weight.device
    ids = list(prompt)
    for _ in range(num_tokens):
        tokens = torch.tensor([ids], device=device)
        positions = torch.arange(len(ids), device=device)[None]
        hidden, _ = model(tokens, Packing(positions, None), dtype)
        ids.append(int(model.logits(hidden[:, -1:]).argmax()))
    return ids
