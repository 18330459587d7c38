"""Stages: what a config changes on the way, and samples that are left out."""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from plait.data.megatron import indexed_dataset
from plait.data.mixture import Source
from plait.data.plan import Plan
from plait.errors import UserError
from plait.pretrain.callbacks import Callback, Checkpointing, MetricsFile
from plait.pretrain.config import Config
from plait.pretrain.config_file import dump_config, parse_config
from plait.pretrain.course import course, plan_of_step
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.optimizer import learning_rate
from plait.pretrain.trainer import Trainer

CLOCKS = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")

WORDS = 2000
"""Ids of the two sources below, each of which stands in one of them once."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> list[str]:
    """Two sources of documents whose ids tell where they stand: 0 to 999, and 1000 to 1999."""
    folder = tmp_path_factory.mktemp("counted")
    prefixes = []
    for name, ids in (("low", range(WORDS // 2)), ("high", range(WORDS // 2, WORDS))):
        builder = indexed_dataset().IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for begin in range(0, len(ids), 100):
            builder.add_document(np.array(ids[begin : begin + 100]), [100])
        builder.finalize(f"{folder / name}.idx")
        prefixes.append(str(folder / name))
    return prefixes


@pytest.fixture
def tree(tiny, counted) -> dict:
    """The tiny config over the two sources, with a small model and no validation."""
    low, high = counted
    tiny["model"] |= {"pattern": "M", "vocab_size": WORDS, "d_model": 16}
    tiny["data"] |= {"blend": {low: 1.0}, "validation": None, "seq_len": 20}
    tiny["train"] |= {"steps": 14, "batch_size": 2}
    tiny["checkpoint"] = {"every": 100}
    tiny["stages"] = [
        {"from_tokens": 120, "train": {"batch_size": 3}},
        {"from_tokens": 300, "data": {"blend": {low: 1.0, high: 3.0}, "seq_len": 30}},
        {"from_tokens": 750, "data": {"blend": {high: 1.0}}, "optim": {"lr": 0.005}},
    ]
    return tiny


class Reads(Callback):
    """What each step read."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.entered: list[tuple[int, dict]] = []

    def start(self, trainer):
        train_step = trainer.train_step

        def remember(batch):
            self.steps.append(batch["tokens"].flatten().tolist())
            return train_step(batch)

        trainer.train_step = remember

    def stage(self, trainer, changes):
        self.entered.append((trainer.state.step, changes))


def run(tree, **changes) -> tuple[Trainer, Reads]:
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    reads = Reads()
    trainer = Trainer(parse_config(tree, "test"), [reads, MetricsFile(), Checkpointing()])
    trainer.run()
    return trainer, reads


def numbers(trainer) -> list[dict]:
    records = read_metrics(trainer.folder.metrics_file)
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


@pytest.fixture
def short_segments(monkeypatch):
    """Windows shuffled within 90 tokens, so that a stage of a few steps goes over several segments."""
    monkeypatch.setattr(Plan, "start", functools.partial(Plan.start, segment_tokens=90))


def test_no_token_of_an_epoch_is_read_twice(tree, counted, short_segments):
    trainer, reads = run(tree)
    low, high = counted
    assert [len(ids) for ids in reads.steps] == [40] * 3 + [60] * 3 + [90] * 8
    assert reads.entered == [
        (3, {"train.batch_size": (2, 3)}),
        (6, {"data.blend": ({low: 1.0}, {low: 1.0, high: 3.0}), "data.seq_len": (20, 30)}),
        (11, {"data.blend": ({low: 1.0, high: 3.0}, {high: 1.0}), "optim.lr": (0.01, 0.005)}),
    ]
    counts = Counter(token for ids in reads.steps for token in ids)
    assert set(counts.values()) == {1}, "within the first epoch of both sources"
    assert sum(counts.values()) == trainer.state.tokens == 1020
    # Of the five mixed steps three samples in four are of the second source, and all of the last three.
    assert sum(token >= WORDS // 2 for token in counts) == pytest.approx(0.75 * 450 + 270, abs=30)
    assert [stage.first_sample for stage in trainer.state.plan.stages] == [0, 15, 30]


@pytest.mark.parametrize("step", [3, 5, 11])
def test_resumed_within_a_stage_or_at_its_border_it_goes_on_to_the_bit(tree, tmp_path, short_segments, step):
    whole, _ = run(tree, run_dir=str(tmp_path / "whole"))
    run(tree, run_dir=str(tmp_path / "halves"), train_stop_at=step)
    again, _ = run(tree, run_dir=str(tmp_path / "halves"), train_stop_at=None)
    assert again.resumed_from == step
    assert numbers(again) == numbers(whole)
    assert again.state.plan == whole.state.plan


def test_a_batch_size_ramp_is_stages_of_one_key(tree):
    tree["stages"] = [{"from_tokens": 20 * n, "train": {"batch_size": n}} for n in (3, 6, 12)]
    trainer, reads = run(tree, train_steps=8)
    assert [len(ids) // 20 for ids in reads.steps] == [2, 2, 3, 6, 12, 12, 12, 12]
    assert [record["tokens"] for record in numbers(trainer)] == [40, 80, 140, 260, 500, 740, 980, 1220]
    assert len(trainer.state.plan.stages) == 1


def test_what_a_step_reads_is_arithmetic(tree, short_segments, tmp_path):
    tree["data"]["skip"] = [[2, 5], [17, 18]]
    _, reads = run(tree)
    config = parse_config(tree, "test")
    for step, ids in enumerate(reads.steps, start=1):
        plan, samples, present = plan_of_step(config, step)
        first = [plan.sample(sample).token for sample in samples]
        prefixes = [plan.sample(sample).prefix for sample in samples]
        length = present.data.seq_len
        offsets = [WORDS // 2 if prefix.endswith("high") else 0 for prefix in prefixes]
        assert [ids[i * length] for i in range(len(samples))] == [
            a + b for a, b in zip(first, offsets, strict=True)
        ]
    assert [(s.stage, s.first_step, s.steps, s.first_tokens) for s in course(config)] == [
        (0, 0, 3, 0),
        (1, 3, 3, 120),
        (2, 6, 5, 300),
        (3, 11, 3, 750),
    ]


def rates(config: Config) -> list[float]:
    """By hand: what `learning_rate` gives, step by step, in each stretch's own schedule."""
    trainer = Trainer(config, [MetricsFile()])
    trainer.run()
    return [record["lr"] for record in read_metrics(trainer.folder.metrics_file)]


def test_a_stage_that_says_a_schedule_begins_it_and_other_keys_do_not(tree, tmp_path):
    tree["optim"] = {"lr": 0.01, "min_lr": 0.001, "warmup_steps": 2, "schedule": "cosine"}
    plain = [
        learning_rate(step, parse_config(tree | {"stages": []}, "test").optim, 12) for step in range(1, 13)
    ]
    tree["train"]["steps"] = 12
    tree["stages"] = [{"from_tokens": 160, "optim": {"lr": 0.02}}]
    tree["run"]["dir"] = str(tmp_path / "peak")
    found = rates(parse_config(tree, "test"))
    assert found[:4] == plain[:4]
    # The same place in the same cosine, between another peak and the same end.
    assert found[4:] == pytest.approx([0.001 + (rate - 0.001) * 19 / 9 for rate in plain[4:]])

    tree["stages"] = [
        {"from_tokens": 160, "optim": {"schedule": "constant"}},
        {"from_tokens": 240, "optim": {"warmup_steps": 3, "lr": 0.03, "schedule": "wsd", "decay_steps": 2}},
    ]
    tree["run"]["dir"] = str(tmp_path / "anew")
    found = rates(parse_config(tree, "test"))
    assert found[:4] == plain[:4]
    assert found[4:] == pytest.approx([0.01, 0.01, 0.01, 0.02, 0.03, 0.03, 0.03, 0.0155])


def test_samples_are_left_out_and_the_plan_says_so(tree, tmp_path):
    tree["stages"] = []
    whole, read = run(tree, run_dir=str(tmp_path / "whole"))
    tree["data"]["skip"] = [[3, 7], [10, 11]]
    again, less = run(tree, run_dir=str(tmp_path / "less"), train_steps=11)

    def samples(reads):
        ids = [token for step in reads.steps for token in step]
        return [ids[i : i + 20] for i in range(0, len(ids), 20)]

    left = samples(read)
    assert samples(less) == [s for i, s in enumerate(left[:27]) if i not in {3, 4, 5, 6, 10}]
    assert (again.state.samples, again.state.tokens) == (27, 440)
    assert again.state.plan.left_out == ((3, 7), (10, 11))
    assert whole.state.samples == 28
    newest = again.checkpoints.newest()
    assert newest is not None
    facts = newest.manifest.facts
    assert Plan.from_json(json.loads(json.dumps(facts["plan"]))) == again.state.plan


def test_what_was_read_cannot_be_left_out_any_more(tree, tmp_path):
    tree["stages"] = []
    tree["data"]["skip"] = [[1, 2]]
    run(tree, train_stop_at=5)
    tree["data"]["skip"] = []
    trainer, _ = run(tree, train_stop_at=6)
    assert trainer.state.plan.left_out == ((1, 2),), "what a run has left out stays left out"
    tree["data"]["skip"] = [[1, 2], [8, 40]]
    with pytest.raises(
        UserError, match=r"data.skip = \[\[8, 13\]\] leaves out samples before 13, which this run"
    ):
        run(tree)
    tree["data"]["skip"] = [[1, 2], [13, 40]]
    trainer, _ = run(tree, train_stop_at=7)
    assert trainer.state.samples == 42


def test_a_stage_that_never_comes_is_a_mistake(tree):
    tree["stages"][2]["from_tokens"] = 10_000
    with pytest.raises(UserError) as error:
        Trainer(parse_config(tree, "test"))
    assert str(error.value) == (
        "stages.2.from_tokens = 10000 is never reached: with train.steps = 14 the run ends at 1020 tokens; "
        "raise train.steps, or take the stage out"
    )


def test_a_stage_added_on_the_way_is_announced_and_holds_from_its_tokens_on(tree, caplog):
    tree["stages"] = []
    run(tree, train_stop_at=4)
    tree["stages"] = [{"from_tokens": 200, "train": {"batch_size": 5}}]
    trainer, reads = run(tree, train_stop_at=7)
    assert "stages was [] in the checkpoint and is [{'from_tokens': 200" in caplog.text
    assert [len(ids) for ids in reads.steps] == [40, 100, 100]
    assert trainer.stage == 1


def test_shards_that_were_moved_are_the_same_shards(tree, counted, tmp_path, caplog):
    tree["stages"] = []
    run(tree, train_stop_at=3)
    for end in (".bin", ".idx"):
        (tmp_path / f"moved{end}").write_bytes(Path(counted[0] + end).read_bytes())
    tree["data"]["blend"] = {str(tmp_path / "moved"): 1.0}
    trainer, _ = run(tree, train_stop_at=4)
    [stage] = trainer.state.plan.stages
    assert [source.prefix for source in stage.sources] == [str(tmp_path / "moved")]


def test_what_a_config_says_of_stages_it_says_again(tree):
    tree["stages"][0]["from_tokens"] = "0.1k"
    config = parse_config(tree, "test")
    assert config.stages[0].from_tokens == 100
    written = yaml.safe_load(dump_config(config))
    assert written["stages"] == [tree["stages"][0] | {"from_tokens": 100}, *tree["stages"][1:]]
    assert parse_config(written, "test") == config


def test_a_plan_takes_what_is_not_left_out():
    plan = Plan.start([Source("a", 1.0, 1000, "a")], seed=0, seq_len=4)
    plan = plan.leave_out(((3, 5), (8, 9), (9, 12)), first_sample=0)
    assert plan.left_out == ((3, 5), (8, 12))
    kept = [i for i in range(60) if i not in {3, 4, 8, 9, 10, 11}]
    for cursor in range(20):
        rest = [i for i in kept if i >= cursor]
        for count in range(1, 12):
            assert plan.take(cursor, count) == rest[:count]
            assert plan.take(plan.advance(cursor, count), 1) == [rest[count]]


def test_shares_do_not_count_what_is_left_out():
    sources = [Source("a", 1.0, 1000, "a"), Source("b", 3.0, 1000, "b")]
    plan = Plan.start(sources, seed=0, seq_len=4).append(sources, first_sample=10, seed=1, seq_len=4)
    plan = plan.leave_out(((2, 5), (9, 14)), first_sample=0)
    for samples in (1, 3, 6, 12, 30):
        read = [plan.sample(i).prefix for i in range(samples) if i not in {2, 3, 4, *range(9, 14)}]
        shares = {name: read.count(name) / len(read) for name in ("a", "b")}
        assert plan.shares(samples) == shares
