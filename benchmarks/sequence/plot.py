"""Bytes against length, by each form: the formulas as lines, what was measured as points."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from .report import NEMOTRON, most_sent
from .volumes import FORMS, MambaShape

__all__ = ["draw"]

COLOURS = dict(zip(FORMS, ("#1b7837", "#2166ac", "#762a83", "#b2182b", "#ef8a62"), strict=True))
LENGTHS = [1 << k for k in range(12, 19)]


def draw(results: dict[str, Any], file: Path) -> None:
    """A panel for the layer that was measured, and two for Nemotron-H-8B's."""
    small = MambaShape(**results["small"])
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    _lines(panels[0], small, 8, f"measured (points) on 8 ranks: D {small.d_model}, fp32")
    for form in FORMS:
        sent: dict[int, int] = {}
        for rank in results["ranks"]["8"]["small"]:
            for record in rank:
                if record["form"] == form:
                    both = record["forward"] + record["backward"]
                    sent[record["length"]] = max(sent.get(record["length"], 0), both)
        panels[0].plot(list(sent), list(sent.values()), "o", color=COLOURS[form], markersize=5)
    _lines(panels[1], NEMOTRON, 8, "by formula: Nemotron-H-8B, bf16, 8 ranks")
    _lines(panels[2], NEMOTRON, 64, "by formula: Nemotron-H-8B, bf16, 64 ranks")
    panels[2].sharey(panels[1])
    panels[0].set_ylabel(
        "bytes a rank sends for one Mamba-2 layer,\nforward and backward, the most over ranks"
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(FORMS), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _lines(panel: Axes, shape: MambaShape, ranks: int, title: str) -> None:
    for form in FORMS:
        sent = [most_sent(form, shape, length, ranks) for length in LENGTHS]
        style = "--" if form.endswith("home") else "-"
        panel.plot(LENGTHS, sent, style, color=COLOURS[form], label=form, linewidth=1.8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(EngFormatter("B"))
    panel.set_xticks(LENGTHS, [f"{length >> 10} K" for length in LENGTHS])
    panel.set_xlabel("tokens of the whole sequence")
    panel.set_title(title, fontsize=10)
    panel.grid(True, which="major", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
