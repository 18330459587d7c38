"""The order of training: what holds from which sample on, what is left out, and the shards it reads.

A plan lists stages (`mixture.py`). A stage holds from its first sample on, and says seed, window length and
sources. Samples are numbered over all stages. Those that the plan leaves out keep their numbers: a cursor
passes over them, so that what comes after them comes earlier.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..errors import UserError
from .mixture import SEGMENT_TOKENS, Sample, Source, Stage
from .shards import Shard

__all__ = ["Plan", "Ranges", "open_blend", "open_sources"]

Ranges = tuple[tuple[int, int], ...]
"""Samples from … to, the second not among them; in order and apart."""

FORMAT = 3
READABLE = (2, FORMAT)
"""Format 2 leaves nothing out."""

OPENING_THREADS = 16


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they hold; the last one holds for ever."""

    stages: tuple[Stage, ...]
    left_out: Ranges = ()
    """Samples that no step reads."""

    @classmethod
    def start(
        cls, sources: Sequence[Source], *, seed: int, seq_len: int, segment_tokens: int = SEGMENT_TOKENS
    ) -> Self:
        """A plan of one stage, from sample 0 on.

        Raises:
            UserError: a source shorter than one window, or two of the same content.
        """
        _check_distinct(sources)
        return cls((Stage(0, seed, seq_len, tuple(sources), segment_tokens),))

    def append(self, sources: Sequence[Source], *, first_sample: int, seed: int, seq_len: int) -> Self:
        """The plan with another stage from ``first_sample`` on.

        A source that the plan has read before, told by its content, goes on at its next segment.
        A last stage that holds for no sample (the same ``first_sample``) is replaced.

        Raises:
            UserError: ``first_sample`` lies before the last stage, or as for :meth:`start`.
        """
        last = self.stages[-1]
        if first_sample < last.first_sample:
            raise UserError(
                f"a stage from sample {first_sample} on would come before the last one, which is from "
                f"{last.first_sample} on; begin from an earlier checkpoint's plan"
            )
        _check_distinct(sources)
        ends = [stage.first_sample for stage in self.stages[1:]] + [first_sample]
        reached: dict[str, Source] = {}
        for stage, end in zip(self.stages, ends, strict=True):
            reached |= {source.content: source for source in stage.after(end - stage.first_sample)}
        moved = tuple(
            replace(source, epoch=found.epoch, token=found.token)
            if (found := reached.get(source.content))
            else source
            for source in sources
        )
        kept = tuple(stage for stage in self.stages if stage.first_sample < first_sample)
        return replace(self, stages=(*kept, Stage(first_sample, seed, seq_len, moved, last.segment_tokens)))

    def go_on(self, sources: Sequence[Source], *, first_sample: int, seed: int, seq_len: int) -> Self:
        """The plan that reads these sources from ``first_sample`` on: this one where it does so already,
        wherever the shards lie by now, else one with another stage, as of :meth:`append`.

        Raises:
            UserError: as for :meth:`append`.
        """
        last = self.stages[-1]
        wanted = (seed, seq_len, [(source.content, source.weight) for source in sources])
        if (last.seed, last.seq_len, [(s.content, s.weight) for s in last.sources]) != wanted:
            return self.append(sources, first_sample=first_sample, seed=seed, seq_len=seq_len)
        places = {source.content: source.prefix for source in sources}
        moved = tuple(replace(s, prefix=places.get(s.content, s.prefix)) for s in last.sources)
        return replace(self, stages=(*self.stages[:-1], replace(last, sources=moved)))

    def leave_out(self, ranges: Ranges, *, first_sample: int) -> Self:
        """The plan that leaves out these samples from ``first_sample`` on; before it, what was left out
        and what was read stay so.

        Raises:
            UserError: a sample before ``first_sample`` that was read.
        """
        before, after = _within(self.left_out, 0, first_sample), _within(ranges, first_sample, None)
        for begin, end in _within(ranges, 0, first_sample):
            if not any(b <= begin and end <= e for b, e in before):
                raise UserError(
                    f"data.skip = [[{begin}, {end}]] leaves out samples before {first_sample}, which this "
                    "run has read; go back to an earlier checkpoint: plait fork RUN@STEP NEW 'data.skip=…'"
                )
        return replace(self, left_out=_joined((*before, *after)))

    def take(self, cursor: int, count: int) -> list[int]:
        """The next samples from a cursor on, without those left out."""
        taken: list[int] = []
        for begin, end in _within(self.left_out, cursor, None):
            taken += range(cursor, min(begin, cursor + count - len(taken)))
            if len(taken) == count:
                return taken
            cursor = end
        return [*taken, *range(cursor, cursor + count - len(taken))]

    def advance(self, cursor: int, count: int) -> int:
        """The cursor after so many samples from one on."""
        for begin, end in _within(self.left_out, cursor, None):
            if cursor + count <= begin:
                break
            count -= begin - cursor
            cursor = end
        return cursor + count

    def sample(self, index: int) -> Sample:
        """Where sample ``index`` of the run lies: O(log stages + sources), no memory."""
        if index < 0:
            raise IndexError(f"sample {index}")
        stage = self.stages[bisect_right(self.stages, index, key=lambda stage: stage.first_sample) - 1]
        return stage.sample(index - stage.first_sample)

    def shares(self, samples: int) -> dict[str, float]:
        """The fraction of the samples read before a cursor that each source was drawn for, by prefix.

        All of it is arithmetic on the plan. A source that no sample has reached yet has the share 0.
        """
        drawn: dict[str, int] = {}
        ends = [stage.first_sample for stage in self.stages[1:]] + [samples]
        for stage, end in zip(self.stages, ends, strict=True):
            first = stage.first_sample
            last = max(first, min(samples, end))
            counts = stage.counts(last - first)
            for begin, until in _within(self.left_out, first, last):
                unread = zip(stage.counts(until - first), stage.counts(begin - first), strict=True)
                counts = [count - (b - a) for count, (b, a) in zip(counts, unread, strict=True)]
            for source, count in zip(stage.sources, counts, strict=True):
                drawn[source.prefix] = drawn.get(source.prefix, 0) + count
        read = sum(drawn.values())
        return {prefix: count / max(1, read) for prefix, count in drawn.items()}

    def to_json(self) -> dict[str, Any]:
        """The plan as what JSON can hold; :meth:`from_json` gives an equal one."""
        return {
            "format": FORMAT,
            "stages": [asdict(stage) for stage in self.stages],
            "left_out": [list(one) for one in self.left_out],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The plan that :meth:`to_json` wrote.

        Raises:
            UserError: it was written by another version.
        """
        if tree.get("format") not in READABLE:
            raise UserError(
                f"the data plan has format {tree.get('format')}, and this plait reads {FORMAT}; "
                "go on with the plait that wrote it"
            )
        stages = [
            Stage(**{**stage, "sources": tuple(Source(**source) for source in stage["sources"])})
            for stage in tree["stages"]
        ]
        return cls(tuple(stages), tuple((begin, end) for begin, end in tree.get("left_out", ())))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the order, which is everything but where the shards lie."""
        tree = self.to_json()
        for stage in tree["stages"]:
            for source in stage["sources"]:
                del source["prefix"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def open_blend(blend: Mapping[str, float]) -> tuple[list[Source], dict[str, Shard]]:
    """The sources of a blend at their beginnings, and their shards by prefix.

    Args:
        blend: weight by prefix.

    Raises:
        UserError: shards that are missing or damaged, a weight that is not positive, or shards made
            with different tokenizers.
    """
    shards = _open_shards(blend)
    made_by: dict[str, str] = {}
    for prefix, shard in shards.items():
        if not (0 < blend[prefix] < math.inf):
            raise UserError(f"data.blend: {prefix} has the weight {blend[prefix]}; give a positive number")
        if shard.manifest:
            made_by.setdefault(shard.manifest.tokenizer_sha256, prefix)
    if len(made_by) > 1:
        one, other, *_ = made_by.values()
        raise UserError(
            f"data.blend: {one} and {other} were built with different tokenizers; rebuild one of them"
        )
    sources = [
        Source(prefix, float(blend[prefix]), shard.num_tokens, shard.content)
        for prefix, shard in shards.items()
    ]
    return sources, shards


def open_sources(plan: Plan, first_sample: int = 0) -> dict[str, Shard]:
    """The shards, by prefix, that a plan reads from a sample on.

    Raises:
        UserError: shards that are missing, damaged, or not those the plan was made for.
    """
    ends = [stage.first_sample for stage in plan.stages[1:]] + [math.inf]
    sources = [
        source
        for stage, end in zip(plan.stages, ends, strict=True)
        for source in stage.sources
        if end > first_sample
    ]
    shards = _open_shards(source.prefix for source in sources)
    for source in sources:
        if shards[source.prefix].content != source.content:
            raise UserError(
                f"{source.prefix}: not the shards that this run began with (they were rebuilt or "
                "replaced); bring those back, or start a new run"
            )
    return shards


def _open_shards(prefixes: Iterable[str]) -> dict[str, Shard]:
    """Shards by prefix, opened by threads: thousands on a network's disk take their time, but the same."""

    def opened(prefix: str) -> Shard:
        shard = Shard(prefix)
        _ = shard.content
        return shard

    prefixes = list(dict.fromkeys(prefixes))
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        return dict(zip(prefixes, pool.map(opened, prefixes), strict=True))


def _check_distinct(sources: Sequence[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        if other := seen.get(source.content):
            raise UserError(
                f"data.blend: {other} and {source.prefix} are the same shards; name one, with both weights"
            )
        seen[source.content] = source.prefix


def _within(ranges: Ranges, begin: int, end: int | None) -> Ranges:
    """What of the ranges lies between two samples."""
    clipped = ((max(a, begin), b if end is None else min(b, end)) for a, b in ranges)
    return tuple((a, b) for a, b in clipped if a < b)


def _joined(ranges: Ranges) -> Ranges:
    """Ranges in order, of which one may begin where another ends, or within it."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return tuple(joined)
