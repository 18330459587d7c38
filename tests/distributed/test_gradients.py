"""After one backward every parameter's gradient is that of one rank, and so are the loss and the norm."""

import pytest
from agreement import assert_same_gradients
from layouts import name

TOLERANCE = 1e-10
"""Relative to a gradient's largest element, in float64."""

LAYOUTS = {
    "tp2": {"tp": 2},
    "sp2": {"sp": 2},
    "dp2": {"dp_shard": 2},
    "sp2-tp2": {"sp": 2, "tp": 2},
    "dp2-sp2": {"dp_shard": 2, "sp": 2},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
}


def check(ranks, one_rank, config, masked=()):
    found = ranks("gradients", config, masked=list(masked))
    assert_same_gradients(found, one_rank("gradients", config, masked=list(masked)), TOLERANCE)
    return found


@pytest.mark.parametrize("layout", ["sp2-tp2", "dp2-sp2"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [None, 1])
def test_recomputation_and_micro_batches(ranks, one_rank, tree, layout, recompute, size):
    changes = {
        "train.activation_checkpointing": recompute,
        "train.micro_batch_size": size,
        "train.batch_size": 4 if layout == "dp2-sp2" else 2,
    }
    found = check(ranks, one_rank, tree(changes, **LAYOUTS[layout]))
    assert {rank["micro_batches"] for rank in found} == {1 if size is None else 2}


@pytest.mark.parametrize("layout", ["dp2", "dp2-sp2", "hsdp"])
def test_ranks_with_more_rows_than_others(ranks, one_rank, tree, layout):
    """Five rows: the last micro-batch of some ranks is padding."""
    changes = {"train.micro_batch_size": 1, "train.activation_checkpointing": True}
    check(ranks, one_rank, tree(changes, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_targets(ranks, one_rank, tree, layout):
    check(ranks, one_rank, tree(**LAYOUTS[layout]), masked=[[0, 2, 10, 140], [3, 5, 200, 249]])


@pytest.mark.parametrize(
    ("layout", "cut"), [({"sp": 2}, 25), ({"sp": 4}, 26), ({"sp": 2, "tp": 2}, 26)], ids=str
)
@pytest.mark.parametrize("recompute", [False, True])
def test_documents_that_begin_around_a_cut(ranks, one_rank, tree, layout, cut, recompute):
    """A row for each place from inside the halo of three tokens to behind it, and one of one document."""
    length = 50
    changes = {
        "model.pattern": "M*M",
        "data.seq_len": length,
        "train.batch_size": 9,
        "train.activation_checkpointing": recompute,
    }
    documents = [[first, length - first] for first in range(cut - 4, cut + 4)] + [[length]]
    config = tree(changes, **layout)
    options = {"documents": documents, "masked": 0.0}
    assert_same_gradients(ranks("drawn", config, **options), one_rank("drawn", config, **options), TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "masked"),
    [
        ("sp2", [0, 5, 0, 125]),
        ("sp2-tp2", [0, 5, 125, 250]),
        ("dp2", [0, 2, 0, 250]),
        ("dp2-sp2", [2, 5, 0, 250]),
    ],
)
def test_a_rank_without_a_target(ranks, one_rank, tree, layout, masked):
    found = check(ranks, one_rank, tree(**LAYOUTS[layout]), masked=[masked])
    assert 0 in {rank["own_targets"] for rank in found}


@pytest.mark.parametrize("layout", ["dp2-sp2"])
def test_nobody_has_a_target(ranks, one_rank, tree, layout):
    changes = {"model.moe.aux_loss": 0.0, "model.moe.z_loss": 0.0}
    found = ranks("gradients", tree(changes, **LAYOUTS[layout]), masked=[[0, 5, 0, 250]])
    for rank in found:
        assert (rank["loss"], rank["norm"], rank["targets"]) == (0.0, 0.0, 0)


@pytest.mark.parametrize("layout", ["tp2", "dp2-sp2", "sp2-tp2"])
def test_tied_embeddings(ranks, one_rank, tree, layout):
    changes = {"model.tie_embeddings": True, "train.activation_checkpointing": True}
    check(ranks, one_rank, tree(changes, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["sp2", "sp2-tp2", "dp2-sp2"])
def test_documents_that_are_not_isolated(ranks, one_rank, tree, layout):
    check(ranks, one_rank, tree({"data.isolate_documents": False}, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 4}, {"sp": 2, "tp": 2}], ids=name)
def test_one_group_for_all_heads(ranks, one_rank, tree, layout):
    """Ranks of tp share the group, and at 4 the key heads."""
    check(ranks, one_rank, tree({"model.mamba.num_groups": 1}, **layout))


def test_softmax_routers_and_latent_experts(ranks, one_rank, tree):
    changes = {
        "model.moe.score": "softmax",
        "model.moe.latent_dim": 16,
        "model.moe.activation": "swiglu",
        "model.mlp.activation": "squared_relu",
    }
    check(ranks, one_rank, tree(changes, **LAYOUTS["sp2-tp2"]))
