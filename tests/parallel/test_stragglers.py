"""Who is slow, by the work of each rank."""

import pytest

from plait.parallel.mesh import Mesh
from plait.parallel.stragglers import Works, find_stragglers

SIZES = {"dp_replicate": 1, "dp_shard": 2, "sp": 3, "tp": 1, "ep": 1}


def test_one_slow_rank():
    assert find_stragglers([1.0, 1.0, 1.0, 1.0, 1.0, 2.5], SIZES) == {
        "slowest_rank": 5,
        "slowest_share": 2.5,
        "stragglers": {"dp_shard": pytest.approx(1.5), "sp": pytest.approx(1.75)},
        "straggler_places": {"dp_shard": 1, "sp": 2},
    }


def test_a_slow_place_of_an_axis_shows_on_that_axis_alone():
    found = find_stragglers([1.0, 2.0, 1.0, 1.0, 2.0, 1.0], SIZES)
    assert found["stragglers"] == {"dp_shard": pytest.approx(1.0), "sp": pytest.approx(2.0)}
    assert found["straggler_places"]["sp"] == 1


@pytest.mark.parametrize("works", [[], [1.0], [1.0, 0.0]], ids=["none", "one rank", "not measured"])
def test_nothing_is_said_of_what_is_not_known(works):
    assert find_stragglers(works, {**SIZES, "dp_shard": 1, "sp": 2}) == {}


def test_one_rank_has_nothing_to_say():
    works = Works(Mesh.single())
    works.begin()
    works.end(1.0)
    assert works.message() == []


def test_a_message_has_this_ranks_work_without_its_waits(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    mesh = Mesh.create({"sp": 3}, rank=1, world_size=3)
    works = Works(mesh)
    assert works.message() == [0.0, 0.0, 0.0]
    works.begin()
    with mesh.waits:
        now += 3.0
    now += 1.0
    assert mesh.waits.during(lambda: "sum") == "sum"
    works.end(10.0)
    assert works.message() == [0.0, 7.0, 0.0]
    works.begin()
    mesh.waits.since(now - 0.5)
    works.end(2.0)
    assert works.message() == [0.0, 1.5, 0.0]
