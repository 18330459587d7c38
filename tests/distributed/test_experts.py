"""Experts in every layout: whoever holds them and whatever the routers choose, the numbers are one rank's."""

import pytest
import torch
from agreement import assert_same_gradients, assert_same_steps
from layouts import EXPERTS, name

TOLERANCE = 1e-10


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=pytest.mark.long if {"dp_replicate", "ep"} < one.keys() else ())
        for one in EXPERTS
    ],
    ids=name,
)
def test_every_gradient(ranks, one_rank, tree, layout):
    config = tree(**layout)
    assert_same_gradients(ranks("gradients", config), one_rank("gradients", config), TOLERANCE)


@pytest.mark.parametrize(
    "layout", [{"sp": 2, "ep": 2}, {"sp": 2, "tp": 2, "ep": 4}, {"dp_shard": 2, "tp": 2, "ep": 2}], ids=name
)
@pytest.mark.parametrize("keeps", [False, True])
def test_recomputed_in_micro_batches(ranks, one_rank, tree, layout, keeps):
    """Five rows: some ranks' last micro-batch is padding, of which no token is sent."""
    changes = {
        "train.activation_checkpointing": True,
        "train.micro_batch_size": 1,
        "model.moe.latent_dim": 12,
    }
    config = tree(changes, keep_dispatched=keeps, **layout)
    assert_same_gradients(ranks("gradients", config), one_rank("gradients", config), TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "ep": 2},
        {"sp": 4, "ep": 4},
        {"sp": 2, "tp": 2, "ep": 2},
        {"dp_replicate": 2, "sp": 2, "ep": 2},
    ],
    ids=name,
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_gets_every_token(ranks, one_rank, tree, layout, top_k):
    """With two choices the other goes to its neighbour, so that most ranks' experts get nothing at all."""
    config = tree({"model.moe.top_k": top_k, "train.activation_checkpointing": True}, **layout)
    options = {"favoured": list(range(top_k))}
    found = ranks("gradients", config, **options)
    tokens = config["train"]["batch_size"] * config["data"]["seq_len"]
    for rank in found:
        assert rank["counts"] == [[tokens] * top_k + [0] * (8 - top_k)]
    assert_same_gradients(found, one_rank("gradients", config, **options), TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2, "ep": 2}, {"tp": 2}, {"sp": 2, "tp": 2, "ep": 4}, {"dp_shard": 2, "tp": 2, "ep": 2}],
    ids=name,
)
def test_the_norm_counts_each_element_once(ranks, tree, layout):
    """Put together from the parts of all ranks, whoever else holds the same."""
    found = ranks("gradients", tree(**layout))
    whole: dict[str, torch.Tensor] = {}
    for rank in found:
        for full_name, (where, values) in rank["gradients"].items():
            shape = [max(r["gradients"][full_name][0][d].stop for r in found) for d in range(values.ndim)]
            whole.setdefault(full_name, torch.zeros(shape, dtype=values.dtype))[where] = values
    norm = float(torch.stack([gradient.square().sum() for gradient in whole.values()]).sum().sqrt())
    experts = sum(float(g.square().sum()) for full_name, g in whole.items() if ".experts." in full_name)
    assert experts > 1e-6 * norm**2, "or the experts' part would not be seen"
    assert [rank["norm"] for rank in found] == pytest.approx([norm] * len(found), rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.moe.num_groups": 4, "model.moe.top_k_groups": 2},
        {"model.moe.score": "softmax", "model.moe.activation": "swiglu", "model.moe.d_shared": 0},
        {"model.moe.latent_dim": 12, "model.moe.top_k": 5},
        {"model.moe.d_expert": 22, "model.moe.num_experts": 6},
    ],
    ids=["groups", "softmax", "latent", "odd"],
)
@pytest.mark.parametrize("layout", [{"sp": 2, "tp": 2, "ep": 2}, {"sp": 3, "ep": 3}], ids=name)
def test_kinds_of_experts(ranks, one_rank, tree, changes, layout):
    if layout["ep"] == 3:
        changes = {"model.moe.num_experts": 6, "model.moe.num_groups": 1, "model.moe.top_k_groups": 1} | {
            key: value for key, value in changes.items() if "groups" not in key
        }
    config = tree(changes, **layout)
    assert_same_gradients(ranks("gradients", config), one_rank("gradients", config), TOLERANCE)


@pytest.mark.parametrize("layout", [{}, {"sp": 2, "tp": 2, "ep": 4}, {"dp_shard": 2, "ep": 2}], ids=name)
@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4))])
def test_balance_does_not_know_micro_batches(ranks, one_rank, tree, layout, size):
    """The losses of the routers and the move of their biases, which shows in the steps after."""
    changes = {"train.batch_size": 4, "model.moe.aux_loss": 0.1, "model.moe.score_bias_rate": 0.05}
    one = one_rank("training", tree(changes), steps=4)
    config = tree(changes | {"train.micro_batch_size": size}, **layout)
    found = ranks("training", config, steps=4) if layout else [one_rank("training", config, steps=4)]
    assert {"aux_loss", "router_z_loss", "max_violation"} <= found[0][0].keys()
    assert_same_steps(found, one, 1e-9)


def test_grouped_products_in_fp32(ranks, one_rank, tree):
    """Where torch has one product for all experts; the routing is fixed, so that no near-tie flips."""
    changes = {"train.dtype": "float32", "model.moe.top_k": 2}
    for layout in ({"sp": 2, "tp": 2, "ep": 2}, {"sp": 4, "ep": 4}):
        config = tree(changes, **layout)
        options = {"favoured": [2, 5]}
        found = ranks("gradients", config, **options)
        assert_same_gradients(found, one_rank("gradients", config, **options), 1e-5)
