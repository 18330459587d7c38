"""The experts' loads as a picture: a row a layer, a column an expert."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_loads"]

MOST_COLUMN_TICKS, MOST_ROW_TICKS = 16, 32


def draw_loads(counts: Sequence[Sequence[float]], layers: Sequence[int], step: int) -> "Figure":
    """A heatmap of each expert's load relative to an even share of its layer's: 1 is even.

    Args:
        counts: tokens that each expert got in the step, for each layer that has experts.
        layers: the layers' numbers.

    Returns:
        A figure of its own, known to no list of matplotlib's: nothing need close it.
    """
    from matplotlib.figure import Figure

    loads = np.asarray(counts, dtype=float)
    loads /= loads.mean(axis=1, keepdims=True)
    rows, columns = loads.shape
    size = (2.5 + min(max(0.4 * columns, 4), 10.5), 1.2 + min(max(0.35 * rows, 1), 7))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(loads, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, extend="max", ticks=[0, 1, 2])
    bar.ax.set_yticklabels(["0: no token", "1: even share", "2 and more"])
    shown = range(0, columns, -(-columns // MOST_COLUMN_TICKS))
    axes.set_xticks(shown, [str(expert) for expert in shown])
    shown = range(0, rows, -(-rows // MOST_ROW_TICKS))
    axes.set_yticks(shown, [str(layers[row]) for row in shown])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"load of the experts in step {step}")
    return figure
