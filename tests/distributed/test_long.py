"""Twenty steps in every layout and dtype, and a table of how far they are from one rank.

`make test-long` runs these; the table lies in benchmarks/results and says on which machine and day.
"""

import pytest
from agreement import HELD, assert_same_steps, differences
from layouts import CALM, EXPERTS, LAYOUTS, PRODUCTS, WITHOUT_EXPERTS, name
from results_page import section, write_page

pytestmark = pytest.mark.long

STEPS = 20

ALL = [
    *LAYOUTS,
    *PRODUCTS,
    {"dp_replicate": 2, "dp_shard": 2, "sp": 2},
    {"dp_shard": 2, "sp": 2, "tp": 2},
    *EXPERTS,
]

MODES = {
    "float64": ({}, 1e-9),
    "float32": (WITHOUT_EXPERTS, 1e-5),
    "bfloat16": (CALM | {"train.dtype": "bfloat16"}, 2e-2),
}
"""What is changed in the config, and the bound: float64's on every metric, the others' on `HELD`."""

CASES = [(mode, layout) for mode in MODES for layout in ALL if mode != "float32" or "ep" not in layout]

COLUMNS = ("loss", "grad_norm", "validation_loss", "state_norm", "aux_loss", "max_violation")


@pytest.fixture(scope="module")
def table():
    """Mode -> layout -> metric -> worst relative difference; written down when all are there."""
    found: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    yield found
    if sum(map(len, found.values())) == len(CASES):
        write(found)


@pytest.mark.parametrize(("mode", "layout"), CASES, ids=[f"{mode}-{name(layout)}" for mode, layout in CASES])
def test_twenty_steps(ranks, one_rank, tree, table, mode, layout):
    changes, bound = MODES[mode]
    config = tree(changes, **layout)
    found, one = ranks("training", config, steps=STEPS), one_rank("training", config, steps=STEPS)
    worst = table[mode][name(layout)] = differences(found[0], one)
    if mode == "float64":
        assert_same_steps(found, one, bound)
    for records in found[1:]:
        assert differences(records, found[0]) == dict.fromkeys(worst, 0.0)
    assert max(worst[metric] for metric in HELD) <= bound


def write(found) -> None:
    lines = []
    for mode, (changes, bound) in MODES.items():
        metrics = [c for c in COLUMNS if any(c in worst for worst in found[mode].values())]
        rows = [
            [layout, *(f"{worst[c]:.1e}" if c in worst else "" for c in metrics)]
            for layout, worst in found[mode].items()
        ]
        most = [max(worst.get(c, 0.0) for worst in found[mode].values()) for c in metrics]
        rows.append(["**worst**", *(f"**{value:.1e}**" for value in most)])
        held = "every metric" if mode == "float64" else ", ".join(HELD)
        pattern = changes.get("model.pattern", "M*-EM")
        heading = f"{mode}, `{pattern}`, bound {bound:.0e} on {held}"
        lines += section(heading, ["layout", *metrics], rows)
    write_page(
        "layouts",
        "Every layout against one rank",
        f"The largest relative difference from one rank over {STEPS} steps, of the metrics of a step and "
        "of the validation loss after the last. All ranks of a layout report the same bits.",
        lines,
    )
