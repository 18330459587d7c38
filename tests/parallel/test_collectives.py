"""On one rank a collective is nothing: no copy, no process group, no entry."""

import pytest
import torch

from plait.parallel.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    gather_stacked,
    reduce_scatter,
    sum_in_place,
)
from plait.parallel.mesh import Mesh
from plait.parallel.placements import shard_range


@pytest.mark.parametrize(
    "call",
    [
        lambda x, axis: all_gather(x, axis, 1),
        lambda x, axis: reduce_scatter(x, axis, 0),
        all_reduce,
        lambda x, axis: all_to_all(x, axis, [3], [3]),
        sum_in_place,
    ],
)
def test_one_rank_keeps_its_tensor(call):
    mesh = Mesh.single()
    x = torch.randn(3, 5, requires_grad=True)
    with mesh.record() as ledger:
        assert call(x, mesh.tp) is x
    assert ledger.entries == []


def test_one_rank_stacks_itself():
    x = torch.randn(3, 5)
    stacked = gather_stacked(x, Mesh.single().sp)
    assert stacked.shape == (1, 3, 5)
    assert stacked.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("size", "ranks"), [(331, 4), (8, 4), (9, 8), (10, 3), (3, 4)])
def test_the_ranges_of_all_ranks_are_the_dim_once_and_as_torch_cuts(size, ranks):
    parts = [list(range(*shard_range(size, ranks, place))) for place in range(ranks)]
    assert [index for part in parts for index in part] == list(range(size))
    chunks = torch.arange(size).chunk(ranks)
    assert parts == [*(chunk.tolist() for chunk in chunks), *[[]] * (ranks - len(chunks))]
