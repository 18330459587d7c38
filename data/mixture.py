"""Which window of which source is sample number ``index`` of a stage, as a pure function.

It is found in three steps, each in integer arithmetic and without state:

1. *Which source*: the weights are whole numbers with sum P. The sources are halved again and again;
   of n samples that reach a half-way point, the first half, of weight w among W, gets round(n w / W)
   and the second the rest. So the first n samples hold each of S sources to within ceil(log2 S) of
   its share, every P samples hold it exactly, and finding a sample's source takes log2 S steps.
2. *Which window of it*: the k-th sample of a source is window number k of its stream, counted on
   over epochs. An epoch cuts the stream into windows of seq_len tokens from an offset that differs
   from epoch to epoch, so that cuts fall elsewhere. It leaves out fewer than 2 seq_len tokens.
3. *Where that lies*: windows are shuffled within segments of about 2**24 tokens, and segments are
   read in turn. A later stage goes on at each source's next segment, so no token of an epoch is
   read twice whatever the new window, blend or seed.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

from ..errors import UserError
from .permutation import Permutation, derive_key

__all__ = ["SEGMENT_TOKENS", "Sample", "Source", "Stage"]

SEGMENT_TOKENS = 2**24
"""Tokens within which windows are shuffled. Documents are shuffled when shards are built, so this only
has to part the windows of one long document. 32 MiB of two-byte tokens stay in a page cache while they
are read at random, and it is what a change of stage skips of a source at most."""


@dataclass(frozen=True)
class Source:
    """Shards in a blend.

    Attributes:
        prefix: where they lie.
        weight: their share of the samples, relative to the others'.
        tokens: how many they hold.
        content: fingerprint of what they hold; the same wherever they lie.
        epoch, token: where a stage begins in them. At token 0 the epoch's own offset applies.
    """

    prefix: str
    weight: float
    tokens: int
    content: str
    epoch: int = 0
    token: int = 0


class Sample(NamedTuple):
    """Where a sample lies: inputs ``token … token + seq_len - 1`` of a source, and one token more."""

    prefix: str
    epoch: int
    token: int
    seq_len: int


@dataclass(frozen=True)
class Stage:
    """What holds from sample ``first_sample`` on.

    Raises:
        UserError: a source that is shorter than one window.
    """

    first_sample: int
    seed: int
    seq_len: int
    sources: tuple[Source, ...]
    segment_tokens: int = SEGMENT_TOKENS

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.tokens <= self.seq_len:
                raise UserError(
                    f"{source.prefix}: {source.tokens} tokens, fewer than one window of data.seq_len + 1 = "
                    f"{self.seq_len + 1}; shorten data.seq_len or bring a larger corpus"
                )

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the stage, counted from 0."""
        j, k = self._turn(index)
        source = self.sources[j]
        epoch, begin, windows, window = self._window(j, k)
        segment, place = divmod(window, self._segment_windows)
        first = segment * self._segment_windows
        size = min(self._segment_windows, windows - first)
        key = derive_key(self.seed, "windows", j, epoch, first)
        place = _permutation(size, key)(place)
        return Sample(source.prefix, epoch, begin + (first + place) * self.seq_len, self.seq_len)

    def after(self, samples: int) -> tuple[Source, ...]:
        """The sources as a stage that follows ``samples`` samples of this one finds them: each at
        the end of the segment it was in, or untouched if it was not read."""
        return tuple(self._source_after(j, count) for j, count in enumerate(self.counts(samples)))

    def _source_after(self, j: int, count: int) -> Source:
        if not count:
            return self.sources[j]
        epoch, begin, windows, window = self._window(j, count - 1)
        segment_end = (window // self._segment_windows + 1) * self._segment_windows
        token = begin + min(segment_end, windows) * self.seq_len
        return replace(self.sources[j], epoch=epoch, token=token)

    @cached_property
    def _weights(self) -> tuple[int, ...]:
        """The weights as whole numbers; a float stands for the decimal that it prints as."""
        fractions = [Fraction(repr(source.weight)) for source in self.sources]
        scale = math.lcm(*(f.denominator for f in fractions))
        numbers = [int(f * scale) for f in fractions]
        divisor = math.gcd(*numbers)
        return tuple(n // divisor for n in numbers)

    @cached_property
    def _weight_before(self) -> tuple[int, ...]:
        """The sum of the weights before each source, and of all."""
        return (0, *accumulate(self._weights))

    def _first_half(self, n: int, begin: int, middle: int, end: int) -> int:
        """Of n samples from the sources begin … end - 1, how many are from begin … middle - 1."""
        before = self._weight_before
        weight, total = before[middle] - before[begin], before[end] - before[begin]
        return (2 * n * weight + total) // (2 * total)

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples come from each source."""

        def split(n: int, begin: int, end: int) -> list[int]:
            if end - begin == 1:
                return [n]
            middle = (begin + end) // 2
            first = self._first_half(n, begin, middle, end)
            return split(first, begin, middle) + split(n - first, middle, end)

        return split(samples, 0, len(self.sources))

    def _turn(self, index: int) -> tuple[int, int]:
        """The source of sample ``index``, and how many samples before it had that source."""
        begin, end = 0, len(self.sources)
        while end - begin > 1:
            middle = (begin + end) // 2
            before = self._first_half(index, begin, middle, end)
            if self._first_half(index + 1, begin, middle, end) > before:
                end, index = middle, before
            else:
                begin, index = middle, index - before
        return begin, index

    @property
    def _segment_windows(self) -> int:
        return max(1, self.segment_tokens // self.seq_len)

    def _window(self, j: int, k: int) -> tuple[int, int, int, int]:
        """For window k of source j: its epoch, the token at which that epoch's first window begins,
        the epoch's number of windows, and the window's number among them."""
        source, length = self.sources[j], self.seq_len
        # One window fewer than might fit, so that there is room to shift the rest.
        windows = max(1, (source.tokens - length) // length)
        epoch = source.epoch
        if source.token:
            left = max(0, (source.tokens - 1 - source.token) // length)
            if k < left:
                return epoch, source.token, left, k
            k -= left
            epoch += 1
        epochs, window = divmod(k, windows)
        epoch += epochs
        slack = source.tokens - 1 - windows * length
        offset = derive_key(self.seed, "offset", j, epoch) % (slack + 1)
        return epoch, offset, windows, window


@lru_cache(maxsize=1024)
def _permutation(size: int, key: int) -> Permutation:
    return Permutation(size, key)
