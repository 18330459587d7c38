"""A run in any layout begins with the weights that one in any other saved, and with more rows if asked to."""

import pytest
import torch
from agreement import whole_tensors
from layouts import name
from saved_runs import shortened

ROWS_OF_VOCABULARY = ("model.embedding.weight", "model.head.weight")

CASES = [
    ({"sp": 2, "ep": 2}, {"dp_shard": 2, "tp": 2, "ep": 2}, True),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, {"dp_replicate": 2, "dp_shard": 2}, False),
    ({"sp": 2, "tp": 2}, {}, False),
    ({}, {"sp": 3}, True),
    ({"sp": 3}, {"tp": 2}, True),
]
"""Who saved, who begins, and whether its vocabulary is larger."""

OLD, NEW = 331, 346
"""Rows; their cuts over three ranks, or over two of tp and then two of dp_shard, lie elsewhere."""


@pytest.mark.parametrize(
    ("saved", "begun", "grows"),
    [
        pytest.param(
            *case, marks=() if case[2] else pytest.mark.long, id=f"{name(case[0])} to {name(case[1])}"
        )
        for case in CASES
    ],
)
def test_the_weights_are_those_that_were_saved(saved_runs, one_rank, tree, tmp_path, saved, begun, grows):
    before = saved_runs(tree(shortened({}), **saved))
    wanted = {k: t for k, t in whole_tensors(before.last_parts).items() if k.startswith("model.")}
    rows = {"model.vocab_size": NEW, "checkpoint.grow_vocabulary": True} if grows else {}
    changes = shortened({"run.seed": 11, "checkpoint.init_from": str(before.folder), **rows})
    found = saved_runs.train(tree(changes, **begun), tmp_path / "run", train=False)
    weights = whole_tensors([rank["states"][0]["parts"] for rank in found])
    assert {k for k in weights if k.startswith("model.")} == wanted.keys()
    assert not any(tensor.any() for k, tensor in weights.items() if k.startswith("optimizer."))
    assert wanted["model.layers.3.mixer.router.correction_bias"].any()
    for full_name, tensor in wanted.items():
        grown = grows and full_name in ROWS_OF_VOCABULARY
        assert torch.equal(weights[full_name][:OLD] if grown else weights[full_name], tensor), full_name
    if grows:
        fresh = one_rank("initial", tree({"run.seed": 11, "model.vocab_size": NEW}))["parts"]
        for full_name in ROWS_OF_VOCABULARY:
            assert weights[full_name].shape[0] == NEW
            assert torch.equal(weights[full_name][OLD:], fresh[full_name.removeprefix("model.")][1][OLD:])
