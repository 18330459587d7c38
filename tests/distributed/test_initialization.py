"""Every layout begins with the numbers of one rank, and no rank ever holds what is not its own."""

import pytest
import torch
from layouts import name

SIZES = {
    # All sizes differ, so that a shape tells which parameter it is.
    "model.d_model": 40,
    "model.vocab_size": 1013,
    "model.moe.d_expert": 28,
    "model.moe.d_shared": 16,
    "model.mlp.d_ff": 56,
}


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"tp": 4},
        {"dp_shard": 2},
        {"dp_replicate": 2},
        {"sp": 3},
        {"dp_shard": 4},
        {"dp_shard": 2, "sp": 2},
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"sp": 2, "tp": 2},
        {"sp": 2, "ep": 2},
        {"sp": 2, "tp": 2, "ep": 2},
        {"dp_replicate": 2, "tp": 2, "ep": 2},
        {"sp": 3, "tp": 2, "ep": 2},
    ],
    ids=name,
)
@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.long), "bfloat16"])
def test_parameters_begin_as_on_one_rank(ranks, one_rank, tree, layout, dtype):
    config = tree(SIZES | {"train.dtype": dtype}, **layout)
    found, one = ranks("initial", config), one_rank("initial", config)
    assert one["allocated"] >= set(one["shapes"].values()), "the mode does not see what is allocated"
    for full_name, (_, whole) in one["parts"].items():
        covered = torch.zeros(whole.shape, dtype=torch.bool)
        for rank in found:
            where, values = rank["parts"][full_name]
            assert rank["shapes"][full_name] == tuple(whole.shape)
            assert values.dtype == whole.dtype
            assert torch.equal(values, whole[where]), full_name
            covered[where] = True
        assert covered.all(), full_name


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"sp": 4, "ep": 2}], ids=name
)
def test_no_rank_allocates_a_whole_parameter(ranks, tree, layout):
    for rank in ranks("initial", tree(SIZES, **layout)):
        mine = {full_name: tuple(values.shape) for full_name, (_, values) in rank["parts"].items()}
        # A vector's whole shape may be that of another's part.
        cut = {
            full_name: shape
            for full_name, shape in rank["shapes"].items()
            if shape != mine[full_name] and len(shape) > 1
        }
        assert len(cut) > 10
        assert not {
            full_name for full_name, shape in cut.items() if shape in rank["allocated"] - set(mine.values())
        }
        whole = rank["shapes"]["embedding.weight"]
        ranks_that_share = layout.get("tp", 1) * layout.get("dp_shard", 1) * layout.get("sp", 1)
        rows = -(-whole[0] // ranks_that_share) + ranks_that_share
        assert rank["largest"] <= rows * whole[1] * 8
