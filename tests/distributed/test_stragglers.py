"""A rank of half the speed is found, though all ranks take equally long for a step."""

import re
from collections import Counter
from statistics import median

import pytest
from layouts import name

STEPS = 12

CASES = [
    ({"sp": 2}, 0),
    pytest.param({"dp_shard": 2}, 1, marks=pytest.mark.long),
    pytest.param({"tp": 2}, 1, marks=pytest.mark.long),
    pytest.param({"dp_replicate": 2}, 1, marks=pytest.mark.long),
    pytest.param({"sp": 2}, 1, marks=pytest.mark.long),
]
"""Layouts, and the rank that is slow; either of them, so that no layout's own unevenness is what is found."""


@pytest.mark.parametrize(
    ("layout", "slow"), CASES, ids=lambda one: name(one) if isinstance(one, dict) else one
)
def test_a_slow_rank_is_found(ranks, tree, layout, slow):
    config = tree({"model.pattern": "M*-M", "train.steps": STEPS}, **layout)
    config["log"]["every"] = STEPS
    found = ranks("straggling", config, slow=slow)
    measured = [step for step in found[0]["steps"] if "slowest_rank" in step]
    # Each step tells of the one before it.
    assert [step["step"] for step in measured] == list(range(2, STEPS + 1))
    keys = ("slowest_rank", "slowest_share", "stragglers", "straggler_places")
    assert [[step.get(key) for key in keys] for step in found[0]["steps"]] == [
        [step.get(key) for key in keys] for step in found[1]["steps"]
    ]
    # Other processes may slow either down for a step.
    assert Counter(step["slowest_rank"] for step in measured).most_common(1)[0][0] == slow
    assert 1.5 < median(step["slowest_share"] for step in measured) < 4
    (axis,) = layout
    assert all(step["straggler_places"] == {axis: step["slowest_rank"]} for step in measured)
    assert all(step["stragglers"][axis] == pytest.approx(step["slowest_share"]) for step in measured)
    line = rf"slow: rank {slow} on \S+ works \d\.\d times .*; along {axis}, place {slow} works \d\.\d times"
    assert len(re.findall(line, found[0]["log"])) == 1
