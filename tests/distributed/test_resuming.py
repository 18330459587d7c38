"""A run goes on from its checkpoint: to the bit in its own layout, and in any other as one rank."""

import shutil

import pytest
import torch
from agreement import differences
from layouts import name

SAVED = {"dp_shard": 2, "sp": 2}
EXPERTS_APART = {"sp": 2, "tp": 2, "ep": 4}
UNEVEN = {"sp": 3, "tp": 2, "ep": 2}
"""Ranks that do not divide what tp leaves of the vocabulary."""


@pytest.fixture(scope="module")
def whole_runs(ranks, tree, tmp_path_factory):
    """By layout: the folder of a run of four steps with checkpoints at 2 and 4, and what its ranks found."""
    runs = {}

    def make(layout):
        key = name(layout)
        if key not in runs:
            folder = tmp_path_factory.mktemp(key) / "run"
            runs[key] = folder, ranks("resuming", shortened(tree, layout), run_dir=folder)
        return runs[key]

    return make


def shortened(tree, layout):
    return tree({"train.steps": 4, "evaluate.every": 2, "model.moe.score_bias_rate": 0.01}, **layout)


def cut_back(folder, target):
    """The run as it was at step 2."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoints" / "step-00000004")
    assert [path.name for path in (target / "checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize(
    "layout", [SAVED, EXPERTS_APART, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}], ids=name
)
def test_the_same_layout_goes_on_bit_for_bit(ranks, tree, whole_runs, tmp_path, layout):
    folder, undisturbed = whole_runs(layout)
    cut_back(folder, tmp_path / "run")
    resumed = ranks("resuming", shortened(tree, layout), run_dir=tmp_path / "run")
    for again, before in zip(resumed, undisturbed, strict=True):
        assert (before["resumed_from"], again["resumed_from"]) == (None, 2)
        assert "validation_loss" in again["steps"][-1]
        assert again["steps"] == before["steps"][2:]
        for full_name, (where, values) in before["parts"].items():
            assert again["parts"][full_name][0] == where
            assert torch.equal(again["parts"][full_name][1], values), full_name


@pytest.mark.parametrize(
    "layout", [{"tp": 4}, {"sp": 4}, {"sp": 2, "tp": 2, "ep": 2}, {"sp": 3}, UNEVEN], ids=name
)
def test_another_layout_goes_on_with_the_same_numbers(ranks, tree, whole_runs, tmp_path, layout):
    folder, undisturbed = whole_runs(SAVED)
    cut_back(folder, tmp_path / "run")
    for rank in ranks("resuming", shortened(tree, layout), run_dir=tmp_path / "run"):
        assert_goes_on(rank, undisturbed[0])


@pytest.mark.parametrize("layout", [SAVED, EXPERTS_APART, UNEVEN], ids=name)
def test_one_rank_goes_on_with_the_same_numbers(one_rank, tree, whole_runs, tmp_path, layout):
    folder, undisturbed = whole_runs(layout)
    cut_back(folder, tmp_path / "run")
    found = one_rank.run("resuming", shortened(tree, {}), run_dir=tmp_path / "run")
    assert_goes_on(found, undisturbed[0])
    for full_name, (_, whole) in found["parts"].items():
        for rank in undisturbed:
            where, values = rank["parts"][full_name]
            torch.testing.assert_close(values, whole[where], rtol=1e-9, atol=1e-12)


def assert_goes_on(resumed, undisturbed):
    assert resumed["resumed_from"] == 2
    worst = differences(resumed["steps"], undisturbed["steps"][2:])
    assert {"loss", "grad_norm", "validation_loss"} <= worst.keys()
    assert max(worst.values()) <= 1e-9
