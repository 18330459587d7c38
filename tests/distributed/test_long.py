"""Twenty steps in every layout and dtype, and a table of how far they are from one rank.

`make test-long` runs these; the table lies in benchmarks/results and says on which machine and day.
"""

import os
import platform
import re
import time
from pathlib import Path

import pytest
import torch
from agreement import assert_same_steps, differences
from layouts import EXPERTS, LAYOUTS, PRODUCTS, name

pytestmark = pytest.mark.long

STEPS = 20

ALL = [
    *LAYOUTS,
    *PRODUCTS,
    {"dp_replicate": 2, "dp_shard": 2, "sp": 2},
    {"dp_shard": 2, "sp": 2, "tp": 2},
    *EXPERTS,
]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

CALM = {"optim.lr": 0.001}
"""At ten times this rate, twenty steps of so small a model grow a rounding to a percent of the norm."""

MODES = {
    "float64": ({}, 1e-9),
    # A router's near-tie flips by rounding, and then a token has another expert: so none here.
    "float32": (CALM | {"train.dtype": "float32", "model.pattern": "M*-M"}, 1e-5),
    "bfloat16": (CALM | {"train.dtype": "bfloat16"}, 2e-2),
}
"""What is changed in the config, and the bound: float64's on every metric, the others' on `HELD`."""

CASES = [(mode, layout) for mode in MODES for layout in ALL if mode != "float32" or "ep" not in layout]

HELD = ("loss", "grad_norm", "validation_loss")

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
    model, slug = processor()
    lines = [
        "# Every layout against one rank",
        "",
        f"Written by `make test-long`. {time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, gloo, Python {platform.python_version()}.",
        "",
        f"The largest relative difference from one rank over {STEPS} steps, of the metrics of a step and "
        "of the validation loss after the last. All ranks of a layout report the same bits.",
    ]
    for mode, (changes, bound) in MODES.items():
        columns = [c for c in COLUMNS if any(c in worst for worst in found[mode].values())]
        pattern = changes.get("model.pattern", "M*-EM")
        held = "every metric" if mode == "float64" else ", ".join(HELD)
        lines += ["", f"## {mode}, `{pattern}`, bound {bound:.0e} on {held}", ""]
        lines += ["| layout | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for layout, worst in found[mode].items():
            cells = [f"{worst[c]:.1e}" if c in worst else "" for c in columns]
            lines.append(f"| {layout} | " + " | ".join(cells) + " |")
        most = [f"{max(w.get(c, 0.0) for w in found[mode].values()):.1e}" for c in columns]
        lines.append("| **worst** | " + " | ".join(f"**{cell}**" for cell in most) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"layouts-{slug}.md").write_text("\n".join(lines) + "\n")


def processor() -> tuple[str, str]:
    """Its name, and the name as part of a file's."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return model, re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
