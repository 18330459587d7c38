"""Parts of windows: what sequence parallelism reads, put together, is the window."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.data import shards as shards_module
from plait.data.loader import Loader
from plait.data.mask import MaskWriter
from plait.data.plan import Plan, open_blend
from plait.data.window import IGNORE, batch, window

# Empty documents, documents of one token, of several sequences, and longer than a window.
DOCUMENTS = [[5], [3, 4, 2], [], [1], [1], [7, 6], [30], [2], [], [1], [11], []]
LENGTHS = [5, 9, 1, 1, 13, 30, 2, 1, 11]
TOKENS = sum(LENGTHS)
SEQ_LEN = 13
CUT = ("tokens", "targets", "positions")


@pytest.fixture(params=["plain", "masked"])
def opened(write_shards, request):
    prefix, stream = write_shards(DOCUMENTS)
    if request.param == "masked":
        with MaskWriter(Path(f"{prefix}.mask")) as writer:
            writer.append(np.random.default_rng(1).random(len(stream)) < 0.6)
    sources, shards = open_blend({str(prefix): 1})
    return Plan.start(sources, seed=5, seq_len=SEQ_LEN), shards, stream


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    index=st.integers(0, 10**6), cuts=st.sets(st.integers(1, SEQ_LEN - 1), max_size=6), isolate=st.booleans()
)
def test_the_parts_of_any_cut_are_the_window(opened, index: int, cuts: set[int], isolate: bool) -> None:
    plan, shards, _ = opened
    whole = window(plan, shards, index, isolate_documents=isolate)
    parts = [
        window(plan, shards, index, isolate_documents=isolate, part=part)
        for part in pairwise([0, *sorted(cuts), SEQ_LEN])
    ]
    for name in CUT:
        joined = np.concatenate([part[name] for part in parts])
        assert joined.dtype == whole[name].dtype
        assert np.array_equal(joined, whole[name])
    for part in parts:
        assert part["document_ids"].dtype == np.int32
        assert np.array_equal(part["document_ids"], whole["document_ids"])


def test_every_part_of_every_place_of_a_shard(opened) -> None:
    """By the documents' lengths, not by the whole window; the shard's first and last window are met."""
    plan, shards, stream = opened
    (shard,) = shards.values()
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    begin_of = (np.cumsum(LENGTHS) - LENGTHS)[document_of]
    counted = shard.counted(0, TOKENS)
    windows_at = {plan.sample(index).token: index for index in range(2000)}
    assert set(windows_at) == set(range(TOKENS - SEQ_LEN))
    ends_met = 0
    for start, index in windows_at.items():
        for lo in range(SEQ_LEN):
            for hi in range(lo + 1, SEQ_LEN + 1):
                arrays = window(plan, shards, index, part=(lo, hi))
                here = np.arange(start + lo, start + hi)
                same = document_of[here] == document_of[here + 1]
                targets = np.where(same & counted[here + 1], stream[here + 1], IGNORE)
                assert np.array_equal(arrays["tokens"], stream[here])
                assert np.array_equal(arrays["targets"], targets)
                assert np.array_equal(arrays["positions"], here - np.maximum(begin_of[here], start))
                ids = np.unique(document_of[start : start + SEQ_LEN], return_inverse=True)[1]
                assert np.array_equal(arrays["document_ids"], ids)
                ends_met += not same[-1]
    assert ends_met > 500


@pytest.mark.parametrize("isolate", [True, False])
def test_only_the_part_is_read(opened, monkeypatch: pytest.MonkeyPatch, isolate: bool) -> None:
    plan, shards, _ = opened
    (shard,) = shards.values()
    dataset = shards_module._open_files(shard).dataset
    read, read_bits = dataset.bin_reader.read, shards_module.read_bits
    reads, bits = [], []

    class Counting:
        def read(self, dtype: type, count: int, offset: int) -> np.ndarray:
            reads.append((offset, count * np.dtype(dtype).itemsize))
            return read(dtype=dtype, count=count, offset=offset)

    def counting(mask: np.ndarray, start: int, length: int) -> np.ndarray:
        bits.append((start, length))
        return read_bits(mask, start, length)

    monkeypatch.setattr(dataset, "bin_reader", Counting())
    monkeypatch.setattr(shards_module, "read_bits", counting)
    for index, (lo, hi) in enumerate([(0, 4), (4, 5), (5, SEQ_LEN), (0, SEQ_LEN)]):
        window(plan, shards, index, isolate_documents=isolate, part=(lo, hi))
        start = plan.sample(index).token
        assert reads.pop() == (2 * (start + lo), 2 * (hi - lo + 1))
        if shard.masked:
            assert bits.pop() == (start + lo + 1, hi - lo)
        assert not reads
        assert not bits


@pytest.mark.parametrize("part", [(0, 0), (4, 4), (5, 4), (-1, 4), (0, SEQ_LEN + 1), (SEQ_LEN, SEQ_LEN + 1)])
def test_a_part_outside_the_window_is_refused(opened, part: tuple[int, int]) -> None:
    plan, shards, _ = opened
    with pytest.raises(ValueError, match=rf"part \({part[0]}, {part[1]}\) .* window of 13 tokens"):
        window(plan, shards, 0, part=part)
    with (
        Loader(plan, shards, cursor=0, batch_size=2, part=part) as loader,
        pytest.raises(ValueError, match="window of 13 tokens"),
    ):
        loader.next()


def test_starts_outside_the_shard_are_refused(opened) -> None:
    (shard,) = opened[1].values()
    assert shard.starts(0, TOKENS).sum() == len(LENGTHS)
    for start, length in ((-1, 2), (0, TOKENS + 1), (TOKENS, 1), (3, 0)):
        with pytest.raises(IndexError, match=f"which has {TOKENS}"):
            shard.starts(start, length)


def test_parts_across_a_change_of_length_are_refused(opened) -> None:
    """Though their tokens would stack: windows of two lengths are no batch."""
    plan, shards, _ = opened
    later = plan.append(list(plan.stages[0].sources), first_sample=2, seed=0, seq_len=7)
    assert batch(later, shards, [2, 3], part=(2, 5))["document_ids"].shape == (2, 7)
    with pytest.raises(ValueError, match="shape"):
        batch(later, shards, [1, 2], part=(2, 5))


@pytest.mark.parametrize("isolate", [True, False])
def test_ranks_share_a_batch_by_rows_and_parts(opened, isolate: bool) -> None:
    plan, shards, _ = opened
    size, bounds = 6, (0, 5, 10, SEQ_LEN)
    got: list[list[dict[str, np.ndarray]]] = [[], []]
    for rank in range(6):
        i, j = divmod(rank, 3)
        with Loader(
            plan,
            shards,
            cursor=size,
            batch_size=size,
            rows=slice(3 * i, 3 * i + 3),
            part=(bounds[j], bounds[j + 1]),
            isolate_documents=isolate,
            workers=2,
        ) as loader:
            loader.next()
            got[i].append(loader.next()[0])
            assert loader.cursor == 3 * size
    whole = batch(plan, shards, range(2 * size, 3 * size), isolate_documents=isolate)
    for name in CUT:
        assert np.array_equal(np.block([[rank[name] for rank in row] for row in got]), whole[name])
    for i, row in enumerate(got):
        for rank in row:
            assert np.array_equal(rank["document_ids"], whole["document_ids"][3 * i : 3 * i + 3])
