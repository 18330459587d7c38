"""Blends of many shards: opened in seconds, in exact shares, and told to the trainer."""

import json
import math
import resource
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.loader import Loader
from plait.data.mixture import Source
from plait.data.plan import Plan, open_blend
from plait.data.window import batch
from plait.pretrain.callbacks import MetricsFile, TensorBoard
from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.trainer import Trainer

WEIGHTS = (0.7, 0.25, 0.05)


def sources(weights) -> list[Source]:
    return [Source(f"s{i}", w, 1000 + i, f"content {i}") for i, w in enumerate(weights)]


@given(st.integers(0, 2**40), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_each_period_holds_70_25_and_5_of_a_hundred(period: int, seed: int) -> None:
    plan = Plan.start(sources(WEIGHTS), seed=seed, seq_len=8)
    counts = Counter(plan.sample(20 * period + i).prefix for i in range(20))
    assert counts == {"s0": 14, "s1": 5, "s2": 1}
    assert plan.shares(20 * (period + 1)) == dict(zip(("s0", "s1", "s2"), WEIGHTS, strict=True))


@given(st.lists(st.sampled_from([1, 2, 0.1, 0.25, 7]), min_size=1, max_size=9), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_any_number_of_samples_is_near_its_shares(weights: list[float], samples: int) -> None:
    plan = Plan.start(sources(weights), seed=0, seq_len=8)
    bound = math.ceil(math.log2(len(weights))) / 2 + 1e-3
    for source, share in zip(plan.stages[0].sources, plan.shares(samples).values(), strict=True):
        assert abs(share * samples - samples * source.weight / sum(weights)) <= bound


@given(
    st.lists(st.sampled_from([1, 2, 0.1, 7]), min_size=2, max_size=5), st.integers(0, 90), st.integers(0, 200)
)
@settings(max_examples=60, deadline=None)
def test_shares_count_what_was_drawn_over_stages(weights: list[float], first: int, samples: int) -> None:
    plan = Plan.start(sources(weights), seed=0, seq_len=8).append(
        sources([3, 1]), first_sample=first, seed=1, seq_len=16
    )
    drawn = Counter(plan.sample(i).prefix for i in range(samples))
    assert {p: round(share * samples) for p, share in plan.shares(samples).items() if share} == drawn


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """A blend of 2000 small shards."""
    folder = tmp_path_factory.mktemp("many")
    lengths = np.full(4, 40, dtype=np.int32)
    rest = lengths.tobytes() + (np.arange(4) * 80).astype(np.int64).tobytes()
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 4, 5) + rest + np.arange(5).astype(np.int64).tobytes()
    for i in range(2000):
        tokens = np.array([*divmod(i, 300), *range(158)], dtype=np.uint16)
        (folder / f"{i}.bin").write_bytes(tokens.tobytes())
        (folder / f"{i}.idx").write_bytes(index)
    return {str(folder / str(i)): 1 + i % 7 for i in range(2000)}


def test_two_thousand_shards_open_in_seconds_and_few_files(many: dict[str, float]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        began = time.perf_counter()
        found, shards = open_blend(many)
        plan = Plan.start(found, seed=0, seq_len=16)
        assert time.perf_counter() - began < 10
        arrays = batch(plan, shards, range(1500))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len({plan.sample(i).prefix for i in range(1500)}) > 1000
    assert arrays["tokens"].shape == (1500, 16)
    began = time.perf_counter()
    for i in range(1000):
        plan.sample(10**9 + i)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("cursor", [0, 1, 17, 40])
def test_any_number_of_threads_from_any_restart_gives_the_plan(many, workers: int, cursor: int) -> None:
    found, shards = open_blend(dict(list(many.items())[:20]))
    plan = Plan.start(found, seed=3, seq_len=16)
    with Loader(plan, shards, cursor=cursor, batch_size=5, workers=workers) as loader:
        for step in range(9):
            arrays, _ = loader.next()
            expected = batch(plan, shards, range(cursor + 5 * step, cursor + 5 * step + 5))
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
            assert loader.cursor == cursor + 5 * (step + 1)


def test_a_run_logs_the_shares_and_reads_by_any_number_of_threads(many, tiny: dict, tmp_path: Path) -> None:
    blend = dict(zip(many, WEIGHTS, strict=False))
    tiny["model"]["pattern"] = "M"
    losses = []
    for workers in (1, 3):
        tiny["run"]["dir"] = str(tmp_path / f"run{workers}")
        tiny["data"] = {"blend": blend, "seq_len": 20, "workers": workers}
        tiny["train"] |= {"steps": 5, "batch_size": 4}
        trainer = Trainer(parse_config(tiny, "test"), [MetricsFile(), TensorBoard()])
        trainer.run()
        records = read_metrics(trainer.folder.metrics_file)
        losses.append([record["loss"] for record in records])
        assert records[-1]["blend_share"] == blend
        assert json.dumps(trainer.state.plan.shares(8)) == json.dumps(records[1]["blend_share"])
    assert losses[0] == losses[1]


def test_one_source_has_no_shares_to_log(tiny: dict) -> None:
    tiny["model"]["pattern"] = "M"
    tiny["train"]["steps"] = 2
    trainer = Trainer(parse_config(tiny, "test"), [MetricsFile()])
    trainer.run()
    assert "blend_share" not in read_metrics(trainer.folder.metrics_file)[-1]
