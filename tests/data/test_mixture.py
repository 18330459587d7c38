import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.mixture import Source
from plait.data.plan import Plan, open_blend, open_sources
from plait.errors import UserError

WEIGHTS = st.sampled_from([1, 2, 3, 7, 0.1, 0.25, 0.7, 1.5])


@st.composite
def blends(draw: st.DrawFn, least: int = 1) -> tuple[int, list[Source]]:
    """A window length and sources that hold at least one window of it."""
    seq_len = draw(st.integers(least, 9))
    tokens = st.integers(seq_len + 1, 150)
    return seq_len, [
        Source(f"s{i}", draw(WEIGHTS), draw(tokens), f"content {i}") for i in range(draw(st.integers(1, 4)))
    ]


def overlapping(plan: Plan, count: int, tokens: dict[str, int]) -> list[tuple[str, int, int]]:
    """The (source, epoch, token) that more than one of the first samples has as an input."""
    seen: Counter[tuple[str, int, int]] = Counter()
    for index in range(count):
        sample = plan.sample(index)
        assert sample.token >= 0
        assert sample.token + sample.seq_len < tokens[sample.prefix], "the last target lies outside"
        seen.update((sample.prefix, sample.epoch, sample.token + i) for i in range(sample.seq_len))
    return [place for place, times in seen.items() if times > 1]


@given(blends(), st.integers(0, 2**62), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_no_token_twice_in_an_epoch(blend, seed: int, segment: int) -> None:
    seq_len, sources = blend
    plan = Plan.start(sources, seed=seed, seq_len=seq_len, segment_tokens=segment)
    assert overlapping(plan, 200, {s.prefix: s.tokens for s in sources}) == []


@given(st.integers(1, 9), st.integers(0, 140), st.integers(0, 99), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_read_whole_before_the_next(seq_len: int, extra: int, seed: int, segment: int) -> None:
    tokens = seq_len + 1 + extra
    plan = Plan.start([Source("s", 1, tokens, "c")], seed=seed, seq_len=seq_len, segment_tokens=segment)
    windows = max(1, (tokens - seq_len) // seq_len)
    assert tokens - windows * seq_len <= 2 * seq_len
    in_segment = max(1, segment // seq_len)
    for epoch in range(4):
        samples = [plan.sample(epoch * windows + i) for i in range(windows)]
        assert {sample.epoch for sample in samples} == {epoch}
        begin = min(sample.token for sample in samples)
        places = [(sample.token - begin) // seq_len for sample in samples]
        assert sorted(places) == list(range(windows))
        assert [p // in_segment for p in places] == sorted(p // in_segment for p in places)


@given(blends())
@settings(max_examples=60, deadline=None)
def test_every_period_holds_each_source_in_its_share(blend) -> None:
    seq_len, sources = blend
    plan = Plan.start(sources, seed=0, seq_len=seq_len)
    weights = [Fraction(str(s.weight)) for s in sources]
    scale = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * scale) for w in weights]
    whole = [w // math.gcd(*whole) for w in whole]
    period = sum(whole)
    drawn = [plan.sample(i).prefix for i in range(3 * period)]
    for start in range(0, 3 * period, period):
        counts = Counter(drawn[start : start + period])
        assert [counts[s.prefix] for s in sources] == whole
    for n in range(period):
        counts = Counter(drawn[:n])
        assert all(
            abs(counts[s.prefix] - Fraction(n * w, period)) <= math.ceil(math.log2(len(sources))) / 2
            for s, w in zip(sources, whole, strict=True)
        )


@given(blends(), blends(), st.integers(0, 60), st.integers(0, 60), st.integers(1, 64), st.integers(0, 2**62))
@settings(max_examples=100, deadline=None)
def test_later_stages_read_no_token_of_an_epoch_again(
    one, two, first: int, more: int, segment: int, seed: int
) -> None:
    """Windows, blend and seed change twice; sources of the same name stay the same shards."""
    (length, sources), (other_length, others) = one, two
    tokens = {s.prefix: s.tokens for s in others} | {s.prefix: s.tokens for s in sources}
    others = [
        Source(s.prefix, s.weight, tokens[s.prefix], s.content)
        for s in others
        if tokens[s.prefix] > other_length
    ] or [Source("new", 1, 30, "new")]
    tokens.setdefault("new", 30)
    plan = Plan.start(sources, seed=seed, seq_len=length, segment_tokens=segment)
    before = [plan.sample(i) for i in range(first)]
    plan = plan.append(others, first_sample=first, seed=seed + 1, seq_len=other_length)
    middle = [plan.sample(i) for i in range(first + more)]
    plan = plan.append(sources, first_sample=first + more, seed=seed, seq_len=length)
    assert middle[:first] == before
    assert [plan.sample(i) for i in range(first + more)] == middle
    assert overlapping(plan, first + more + 60, tokens) == []
    assert plan.sample(first + more).seq_len == length


def test_untouched_source_of_a_later_stage_begins_where_it_was() -> None:
    a, b = Source("a", 1, 100, "a"), Source("b", 1, 100, "b")
    plan = Plan.start([a], seed=0, seq_len=4, segment_tokens=16).append(
        [a, b], first_sample=3, seed=0, seq_len=4
    )
    moved, new = plan.stages[1].sources
    assert new == b
    assert moved.epoch == 0
    # Three windows are read of the first segment's four; the stage goes on after the fourth.
    begin = min(plan.stages[0].sample(i).token for i in range(24))
    assert moved.token == begin + 16


def test_stage_without_samples_is_replaced() -> None:
    a = Source("a", 1, 100, "a")
    plan = Plan.start([a], seed=0, seq_len=4).append([a], first_sample=5, seed=1, seq_len=4)
    again = plan.append([a], first_sample=5, seed=2, seq_len=3)
    assert len(again.stages) == 2
    assert again.stages[1].sources == plan.stages[1].sources
    with pytest.raises(UserError, match="before the last"):
        plan.append([a], first_sample=4, seed=0, seq_len=4)


def test_epochs_differ_in_order_and_in_cuts() -> None:
    plan = Plan.start([Source("s", 1, 10_007, "c")], seed=3, seq_len=16)
    windows = (10_007 - 16) // 16
    epochs = [[plan.sample(e * windows + i).token for i in range(windows)] for e in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    assert len({min(e) % 16 for e in epochs}) > 1
    assert epochs[0] != sorted(epochs[0])


@given(blends(), st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_json_gives_an_equal_plan_at_any_index(blend, index: int) -> None:
    seq_len, sources = blend
    plan = Plan.start(sources, seed=9, seq_len=seq_len).append(
        sources, first_sample=50, seed=1, seq_len=seq_len
    )
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.sample(index) == plan.sample(index)


def test_fingerprint_follows_the_order_and_not_the_place() -> None:
    def fingerprint(
        prefix: str = "a", content: str = "c", weight: float = 1, seed: int = 0, seq_len: int = 8
    ) -> str:
        return Plan.start([Source(prefix, weight, 99, content)], seed=seed, seq_len=seq_len).fingerprint

    assert fingerprint(prefix="elsewhere/a") == fingerprint()
    changed = [fingerprint(content="d"), fingerprint(weight=2), fingerprint(seed=1), fingerprint(seq_len=9)]
    assert len({fingerprint(), *changed}) == 5


def test_order_never_changes() -> None:
    """Runs resume on this order: a change of it needs a new plan format."""
    sources = [Source("a", 0.7, 1000, "a"), Source("b", 0.3, 500, "b")]
    plan = Plan.start(sources, seed=1234, seq_len=16, segment_tokens=128)
    assert [tuple(plan.sample(i))[:3] for i in (0, 1, 2, 3, 99, 10**9)] == GOLDEN


def test_mistakes(write_shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a: 16 tokens.*data.seq_len \+ 1 = 17"):
        Plan.start([Source("a", 1, 16, "c")], seed=0, seq_len=16)
    with pytest.raises(UserError, match="the same shards"):
        Plan.start([Source("a", 1, 99, "c"), Source("b", 1, 99, "c")], seed=0, seq_len=16)
    with pytest.raises(UserError, match="format 7"):
        Plan.from_json({"format": 7})
    prefix, _ = write_shards([[50], [60]])
    with pytest.raises(UserError, match="weight"):
        open_blend({str(prefix): 0.0})


def test_opening_finds_replaced_shards(write_shards) -> None:
    prefix, _ = write_shards([[50], [60]])
    sources, shards = open_blend({str(prefix): 2})
    assert (sources[0].tokens, sources[0].weight) == (110, 2.0)
    plan = Plan.start(sources, seed=0, seq_len=8)
    assert open_sources(plan).keys() == shards.keys()
    write_shards([[60], [50]])
    with pytest.raises(UserError, match="not the shards"):
        open_sources(plan)
    # A stage that no sample reads any more needs no shards.
    other, _ = write_shards([[70]], name="other")
    later = plan.append(open_blend({str(other): 1})[0], first_sample=10, seed=0, seq_len=8)
    assert open_sources(later, first_sample=10).keys() == {str(other)}


GOLDEN = [("a", 0, 108), ("b", 0, 7), ("a", 0, 44), ("a", 0, 28), ("a", 1, 176), ("a", 11475409, 862)]
