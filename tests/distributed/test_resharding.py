"""A checkpoint of any layout is taken up in any other: to the bit in its own, and as one rank in others.

Saved at step 3 of 6. What comes back at step 3 has the very bits that were saved, in every layout: weights,
moments, routers' biases and counts, random state and place in the data. `make test-long` takes up each of
eight layouts in each, in float64 and in fp32, and writes how far they are from one rank that was never
stopped.
"""

import itertools

import pytest
import torch
from agreement import assert_same_steps, differences, distance, whole_tensors
from layouts import EXCHANGES, WITHOUT_EXPERTS
from results_page import section, write_page
from saved_runs import EVERY, STEPS, shortened

EIGHT = {
    "one rank": {},
    "tp2": {"tp": 2},
    "sp4 scan": {"sp": 4, "state_exchange": "scan"},
    "sp2 ep2": {"sp": 2, "ep": 2},
    "dp_shard2 tp2 ep2": {"dp_shard": 2, "tp": 2, "ep": 2},
    "dp_replicate2 dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "sp2 tp2": {"sp": 2, "tp": 2},
    "sp3": {"sp": 3},
}
"""Five rows, 250 tokens and 331 ids: none of them divides by all of these."""

MANNERS = [
    {},
    {"train.micro_batch_size": 1},
    {"train.activation_checkpointing": True},
    {"train.micro_batch_size": 2, "train.activation_checkpointing": True},
]
"""What else changes where another layout goes on."""

MODES = {"float64": ({}, 1e-9, ()), "float32": (WITHOUT_EXPERTS, 1e-5, ("z_loss",))}
"""What is changed in the config, the bound on every metric and every tensor's distance, and what is left out:
z_loss is the difference of two sums, and fp32 keeps few of its digits."""

MATRIX = [*itertools.product(MODES, EIGHT, EIGHT)]

# Each layout once as the one that saves and once as the one that goes on; then some in themselves.
DOZEN = [
    *zip(EIGHT, [*list(EIGHT)[1:], "one rank"], strict=True),
    *((key, key) for key in ("one rank", "sp2 ep2", "dp_shard2 tp2 ep2", "sp3")),
]

FURTHER = {
    "the same in another manner": (
        EIGHT["sp4 scan"],
        {"sp": 4, "state_exchange": "ring", "fold_queries": False},
        {"train.micro_batch_size": 1},
    ),
    "copies of experts apart": (
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {},
    ),
    # Three ranks divide neither these experts nor what tp leaves of the vocabulary.
    "to six": (EIGHT["sp2 tp2"], {"sp": 3, "tp": 2, "ep": 2}, {}),
    "from six": ({"sp": 3, "tp": 2, "ep": 2}, {}, {}),
}


@pytest.fixture(scope="module")
def page():
    """Mode -> (saved, resumed) -> worst difference of metrics and of tensors; written when all are there."""
    found = {mode: {} for mode in MODES}
    yield found
    if sum(map(len, found.values())) == len(MATRIX):
        write(found)


@pytest.mark.parametrize(("saved", "resumed"), DOZEN, ids=map(" to ".join, DOZEN))
def test_a_covering_dozen(saved_runs, tree, tmp_path, saved, resumed):
    check_pair(saved_runs, tree, tmp_path, "float64", saved, resumed)


@pytest.mark.parametrize(
    "case", [*FURTHER][:1] + [pytest.param(case, marks=pytest.mark.long) for case in [*FURTHER][1:]]
)
def test_further_pairs(saved_runs, tree, tmp_path, case):
    saved, resumed, manner = FURTHER[case]
    check(saved_runs, tree, tmp_path, "float64", saved, resumed, manner)


@pytest.mark.long
@pytest.mark.parametrize(("mode", "saved", "resumed"), MATRIX, ids=map(" to ".join, MATRIX))
def test_the_matrix(saved_runs, tree, tmp_path, page, mode, saved, resumed):
    page[mode][saved, resumed] = check_pair(saved_runs, tree, tmp_path, mode, saved, resumed)


def check_pair(saved_runs, tree, tmp_path, mode, saved, resumed):
    one, other = EIGHT[saved], EIGHT[resumed]
    if saved == resumed:
        return check(saved_runs, tree, tmp_path, mode, one, other, {})
    number = list(EIGHT).index(saved) + list(EIGHT).index(resumed)
    if "sp" in other:
        other = {"state_exchange": EXCHANGES[number % len(EXCHANGES)], **other}
    return check(saved_runs, tree, tmp_path, mode, one, other, MANNERS[number % len(MANNERS)])


def check(saved_runs, tree, tmp_path, mode, saved, resumed, manner):
    """Take up a run in another layout and manner; the worst difference of its metrics and of its tensors."""
    changes, bound, left_out = MODES[mode]
    if mode == "float32":
        saved, resumed = ({k: v for k, v in layout.items() if k != "ep"} for layout in (saved, resumed))
    before = saved_runs(tree(shortened(changes), **saved))
    assert [rank["resumed_from"] for rank in before.found] == [None] * len(before.found)
    folder = before.cut_back(tmp_path / "run")
    found = saved_runs.train(tree(shortened(changes | manner), **resumed), folder)
    comes_back(before, found)
    if (saved, manner) == (resumed, {}):
        goes_on_bit_for_bit(before, found)
        return 0.0, 0.0
    (one,) = saved_runs(tree(shortened(changes))).found
    return goes_on(found, one, bound, left_out)


def comes_back(before, found):
    """What was saved, to the bit."""
    wanted = whole_tensors(before.parts)
    again = whole_tensors([rank["states"][EVERY]["parts"] for rank in found])
    assert again.keys() == wanted.keys()
    for full_name, tensor in wanted.items():
        assert again[full_name].dtype == tensor.dtype
        assert torch.equal(again[full_name], tensor), full_name
    for rank in found:
        assert rank["resumed_from"] == EVERY
        assert rank["states"][EVERY]["place"] == before.found[0]["states"][EVERY]["place"]
        assert rank["drawn"] == before.found[0]["drawn"][EVERY:]


def goes_on_bit_for_bit(before, found):
    for again, rank in zip(found, before.found, strict=True):
        assert "validation_loss" in again["steps"][-1]
        assert again["steps"] == rank["steps"][EVERY:]
        assert again["states"][STEPS]["place"] == rank["states"][STEPS]["place"]
        for full_name, (where, values) in rank["states"][STEPS]["parts"].items():
            assert again["states"][STEPS]["parts"][full_name][0] == where
            assert torch.equal(again["states"][STEPS]["parts"][full_name][1], values), full_name


def goes_on(found, one, bound, left_out):
    """As one rank that was never stopped, within a bound on every metric and tensor."""
    steps, *ranks = (
        [{k: v for k, v in record.items() if k not in left_out} for record in records]
        for records in (one["steps"][EVERY:], *(rank["steps"] for rank in found))
    )
    assert_same_steps(ranks, steps, bound)
    for rank in found:
        assert rank["states"][STEPS]["place"] == one["states"][STEPS]["place"]
    wanted = whole_tensors([one["states"][STEPS]["parts"]])
    again = whole_tensors([rank["states"][STEPS]["parts"] for rank in found])
    assert torch.equal(again["rng.cpu"], wanted.pop("rng.cpu"))
    apart = {full_name: distance(again[full_name], tensor) for full_name, tensor in wanted.items()}
    assert not {full_name: far for full_name, far in apart.items() if not far <= bound}
    return max(differences(ranks[0], steps).values()), max(apart.values())


def write(found):
    lines = []
    for mode, (changes, bound, left_out) in MODES.items():
        pattern = changes.get("model.pattern", "M*-EM")
        metrics = f"metrics{' but ' if left_out else ''}{', '.join(left_out)}"
        for number, what in enumerate((metrics, "tensors after the last step")):
            rows = [
                [saved, *(cell(found[mode][saved, resumed][number], saved == resumed) for resumed in EIGHT)]
                for saved in EIGHT
            ]
            lines += section(
                f"{mode}, `{pattern}`, bound {bound:.0e}: {what}", ["saved in \\ resumed in", *EIGHT], rows
            )
    write_page(
        "resharding",
        "Every layout's checkpoint, taken up in every layout",
        f"Saved after step {EVERY}, resumed to step {STEPS}, against {STEPS} steps of one rank; on the "
        "diagonal against the same layout, never stopped. Metrics: the largest relative difference. Tensors: "
        "the norm of the difference over the norm, the largest over weights, moments, routers' biases and "
        "counts. What was resumed had the very bits that were saved, in every pair. fp32 has no experts, and "
        "so no ep. Off the diagonal micro-batches, activation checkpointing and state_exchange change from "
        "pair to pair.",
        lines,
    )


def cell(value, same):
    return "**same bits**" if same else f"{value:.1e}"
