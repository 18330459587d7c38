"""Stages and samples left out mean the same in every layout, also where one takes over from another."""

import pytest
from agreement import differences
from layouts import name

STAGES = {
    "data.skip": [[3, 6], [14, 15]],
    "train.steps": 6,
    "evaluate.every": 3,
    "checkpoint.every": 3,
    "stages": [
        # Three sequences on two data ranks, and a window that three ranks cut unevenly.
        {"from_tokens": 2500, "train": {"batch_size": 3}, "optim": {"lr": 0.005}},
        {"from_tokens": 3500, "data": {"seq_len": 130}, "optim": {"schedule": "cosine"}},
    ],
}


@pytest.mark.parametrize("layout", [{"dp_shard": 2, "sp": 2}, {"sp": 3}], ids=name)
def test_stages_in_another_layout(ranks, one_rank, tree, tmp_path, layout):
    one = one_rank("resuming", tree(STAGES), seed=0)
    assert [record["tokens"] for record in one["steps"]] == [1250, 2500, 3250, 4000, 4390, 4780]
    stopped = tree(STAGES | {"train.stop_at": 3}, **layout)
    found = ranks("resuming", stopped, run_dir=tmp_path / "run", seed=0)
    again = one_rank.run("resuming", tree(STAGES), run_dir=tmp_path / "run", seed=0)
    assert again["resumed_from"] == 3
    steps = [*found[0]["steps"], *again["steps"]]
    worst = differences(steps, one["steps"])
    assert {"loss", "grad_norm", "validation_loss"} <= worst.keys()
    assert max(worst.values()) <= 1e-9
    assert [record["lr"] for record in steps] == [record["lr"] for record in one["steps"]]
