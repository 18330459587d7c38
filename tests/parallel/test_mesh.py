"""Who is who among the ranks, and which rows and tokens are whose."""

import itertools

import pytest
import torch

from plait.errors import UserError
from plait.parallel.axes import AXES
from plait.parallel.mesh import Mesh

SIZES = {"dp_replicate": 2, "dp_shard": 3, "sp": 2, "tp": 2}


def meshes(**sizes):
    """The mesh of each rank."""
    sizes = dict.fromkeys(AXES, 1) | sizes
    ranks = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["sp"] * sizes["tp"]
    return [Mesh.create(sizes, rank=rank, world_size=ranks) for rank in range(ranks)]


def test_every_rank_has_its_own_place():
    places = [tuple(mesh.place(axis) for axis in AXES) for mesh in meshes(**SIZES)]
    assert places == list(itertools.product(range(2), range(3), range(2), range(2)))


@pytest.mark.parametrize(
    ("flattened", "axes"),
    [
        ("fsdp", ("dp_shard", "sp")),
        ("data", ("dp_replicate", "dp_shard", "sp")),
        ("tokens", ("sp", "tp")),
        ("world", AXES),
    ],
)
def test_flattened_axes_count_their_axes_in_order(flattened, axes):
    combinations = list(itertools.product(*(range(SIZES[axis]) for axis in axes)))
    for mesh in meshes(**SIZES):
        assert mesh.size(flattened) == len(combinations)
        place = tuple(mesh.place(axis) for axis in axes)
        assert combinations[mesh.place(flattened)] == place
        assert (mesh.axes[flattened].size, mesh.axes[flattened].place) == (
            mesh.size(flattened),
            mesh.place(flattened),
        )


@pytest.mark.parametrize("batch_size", [6, 7, 14])
def test_the_rows_of_all_data_ranks_are_the_batch_once(batch_size):
    rows = {}
    for mesh in meshes(**SIZES):
        place = (mesh.place("dp_replicate"), mesh.place("dp_shard"))
        assert rows.setdefault(place, mesh.rows(batch_size)) == mesh.rows(batch_size)
    shares = [range(batch_size)[rows[place]] for place in sorted(rows)]
    assert [row for share in shares for row in share] == list(range(batch_size))
    assert max(map(len, shares)) == -(-batch_size // 6)
    assert min(map(len, shares)) >= batch_size // 6


@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (3, 1), (8, 1), (2, 2), (4, 2), (1, 4)])
@pytest.mark.parametrize("length", [50, 250, 256])
def test_the_tokens_of_all_ranks_are_the_sequence_once(sp, tp, length):
    shards = set()
    for mesh in meshes(sp=sp, tp=tp):
        shard = mesh.shard_length(length)
        first, end = mesh.tokens(length)
        shards.add((first, end))
        assert first == mesh.place("sp") * shard
        assert end == min(length, first + shard)
        assert shard % tp == 0
        # Not more padding than one row of tokens over all ranks.
        assert 0 <= sp * shard - length < sp * tp
    covered = [token for first, end in sorted(shards) for token in range(first, end)]
    assert covered == list(range(length))


def test_250_tokens_on_8_ranks():
    assert [mesh.tokens(250) for mesh in meshes(sp=8)] == [
        *((first, first + 32) for first in range(0, 224, 32)),
        (224, 250),
    ]


def test_a_layout_that_needs_other_ranks_is_refused():
    with pytest.raises(UserError, match=r"needs 24 ranks but 8 were started"):
        Mesh.create(SIZES, rank=0, world_size=8)


def test_one_rank_has_no_groups_and_connects_to_nobody():
    mesh = Mesh.single().connect(torch.device("cpu"))
    assert mesh.device_mesh is None
    assert all(axis.size == 1 and axis.group is None for axis in (*mesh.axes.values(), mesh.states))
