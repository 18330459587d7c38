"""Who is who among the ranks."""

import pytest

from plait.errors import UserError
from plait.parallel import Mesh

SIZES = {"dp_replicate": 2, "dp_shard": 3, "sp": 2, "tp": 2}


def test_every_rank_has_its_own_place():
    places = set()
    for rank in range(24):
        mesh = Mesh.create(SIZES, rank=rank, world_size=24)
        places.add(tuple(mesh.place(axis) for axis in SIZES))
    assert len(places) == 24
    assert Mesh.create(SIZES, rank=1, world_size=24).place("tp") == 1


def test_the_rows_of_all_data_ranks_are_the_batch_once():
    rows = {}
    for rank in range(24):
        mesh = Mesh.create(SIZES, rank=rank, world_size=24)
        place = (mesh.place("dp_replicate"), mesh.place("dp_shard"))
        assert rows.setdefault(place, mesh.rows(14)) == mesh.rows(14)
    assert sorted(row for part in rows.values() for row in range(14)[part]) == list(range(14))


def test_a_layout_that_needs_other_ranks_is_refused():
    with pytest.raises(UserError, match=r"needs 24 rank\(s\) but 8 were started"):
        Mesh.create(SIZES, rank=0, world_size=8)
