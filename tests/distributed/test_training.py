"""Steps of training in every layout are those of one rank: loss, norms, loads and validation."""

import pytest
from agreement import assert_same_steps
from layouts import EXPERTS, LAYOUTS, PRODUCTS, name
from pool import ranks_of

from plait.data.plan import Plan, open_blend
from plait.data.window import batch

TOLERANCE = 1e-9
"""Relative, in float64: sums in another order differ by 1e-15, a fault by far more."""

STEPS = 3


QUICK = [
    layout
    for layout in (*LAYOUTS, *EXPERTS)
    if ranks_of({"parallel": layout}) < 8 or layout.get("state_exchange") == "scan"
]
"""Without most of eight ranks, which take as long as all others: test_experts.py has their gradients, and
`make test-long` their steps."""


@pytest.mark.parametrize("layout", QUICK, ids=name)
def test_three_steps(ranks, one_rank, tree, layout):
    config = tree(**layout)
    assert_same_steps(
        ranks("training", config, steps=STEPS), one_rank("training", config, steps=STEPS), TOLERANCE
    )


# `make test-long` has all products.
@pytest.mark.parametrize("layout", PRODUCTS[:1], ids=name)
def test_twenty_steps_of_products(ranks, one_rank, tree, layout):
    config = tree({"model.pattern": "M*-E"}, **layout)
    assert_same_steps(ranks("training", config, steps=20), one_rank("training", config, steps=20), TOLERANCE)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 4}, {"sp": 2, "tp": 2}], ids=name)
def test_one_group_for_all_heads(ranks, one_rank, tree, layout):
    """tp exceeds the groups, and at 4 the key heads."""
    config = tree({"model.mamba.num_groups": 1, "model.pattern": "M*"}, **layout)
    assert_same_steps(
        ranks("training", config, steps=STEPS), one_rank("training", config, steps=STEPS), TOLERANCE
    )


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_the_documents_cross_and_meet_the_cuts(corpus, tree, shards):
    """What the layouts above are worth: the windows that they read have documents of both kinds."""
    config = tree()
    length, prefix = config["data"]["seq_len"], str(corpus / "train")
    sources, opened = open_blend({prefix: 1.0})
    plan = Plan.start(sources, seed=config["run"]["seed"], seq_len=length)
    ids = batch(plan, opened, range(STEPS * config["train"]["batch_size"]))["document_ids"]
    shard = -(-length // shards)
    starts = ids[:, 1:] != ids[:, :-1]
    for cut in range(shard, length, shard):
        assert (ids[:, cut - 1] == ids[:, cut]).any(), f"no document crosses {cut}"
    halo = 3
    near = [starts[:, cut - 1 - halo : cut + halo].any() for cut in range(shard, length, shard)]
    assert any(near), "no document begins near a cut"
