"""From logits to an id: greedy, or at random within a nucleus, from a seed.

A row's random numbers follow from the seed, its prompt, and how many equal prompts stand before it.
So a text is the same whatever else is in the batch, and a prompt given twice gives two samples.

Shapes: B batch, V vocabulary.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError

__all__ = ["GREEDY", "Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How an id is chosen.

    Raises:
        UserError: a number out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest."""
    top_p: float = 1.0
    """Choose among the fewest likeliest ids that have this probability together (arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: give 0, which is greedy, or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: give more than 0, and 1 at most")


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Draws the ids of a batch; each row has a random generator of its own."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        self.sampling = sampling
        self._generators = []
        before: Counter[tuple[int, ...]] = Counter()
        for prompt in map(tuple, prompts):
            key = f"{sampling.seed}/{before[prompt]}/{prompt}".encode()
            before[prompt] += 1
            digest = hashlib.blake2b(key, digest_size=8).digest()
            self._generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next id of each row, int64 (B,)."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        # One number a row and token, on the CPU whatever the device.
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        return choose(logits_BV, torch.stack(draws).to(logits_BV.device), self.sampling)


def choose(logits_BV: Tensor, draw_B: Tensor, sampling: Sampling) -> Tensor:
    """The id at which the probabilities, added up from the likeliest on, pass the row's draw in [0, 1)."""
    probability = (logits_BV.double() / sampling.temperature).softmax(-1)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    reached = probability.cumsum(-1)
    # The likeliest stays in any nucleus.
    inside = reached - probability < sampling.top_p
    total = (probability * inside).sum(-1)
    place = torch.searchsorted(reached, (draw_B * total)[:, None], right=True)
    place = place.clamp_(max=inside.sum(-1, keepdim=True) - 1)
    return order.gather(-1, place)[:, 0]
