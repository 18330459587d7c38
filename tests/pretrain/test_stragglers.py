"""Lines of run.log about slow ranks: one when a rank stays slow, one when it is so no longer."""

from types import SimpleNamespace
from typing import Any, cast

from plait.parallel.mesh import Mesh
from plait.pretrain.callbacks import Stragglers


def lines(ranks_and_shares: list[tuple[int, float]], every: int = 5) -> list[str]:
    """What is said, a step for each slowest rank and its share."""
    said: list[str] = []
    config = SimpleNamespace(log=SimpleNamespace(every=every))
    trainer = cast(Any, SimpleNamespace(mesh=Mesh.single(), config=config, say=said.append))
    callback = Stragglers()
    callback.start(trainer)
    callback._hosts = [f"node{rank}" for rank in range(4)]
    for step, (rank, share) in enumerate(ranks_and_shares, 1):
        more = {"stragglers": {"dp_shard": 1.1, "sp": 1.4}, "straggler_places": {"dp_shard": 0, "sp": 1}}
        callback.step(trainer, {"step": step, "slowest_rank": rank, "slowest_share": share, **more})
    return said


SLOW = "slow: rank {0} on node{0} works 1.9 times as long on a step as the other ranks' median; along sp, place 1 works 1.4 times as long as the others"  # noqa: E501
OVER = "slow no longer: rank {0} on node{0}"


def test_a_change_is_told_once():
    even, first, second = [(0, 1.1)] * 5, [(1, 1.9)] * 5, [(3, 1.9)] * 5
    assert lines(even * 3) == []
    assert lines(even + first * 3 + second + even * 2) == [SLOW.format(1), SLOW.format(3), OVER.format(3)]


def test_a_few_slow_steps_and_ranks_that_take_turns_are_no_straggler():
    assert lines([(1, 9.0), (1, 9.0), (0, 1.1), (0, 1.1), (0, 1.1)]) == []
    assert lines([(0, 1.9), (0, 1.9), (1, 1.9), (1, 1.9), (2, 1.9)]) == []


def test_few_steps_are_gathered_until_they_suffice():
    assert lines([(1, 1.9)] * 4, every=1) == []
    assert lines([(1, 1.9)] * 6, every=1) == [SLOW.format(1)]
