"""Losses as a picture: the frame of every such picture, and the curves of runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["loss_picture", "plot_losses"]

SMOOTHING_SHARE = 0.04
"""The smoothed curve averages, with a fading weight, over this share of a run's steps."""


def plot_losses(runs: Sequence[Path], out: Path) -> Path:
    """Draw each run's training loss, thin and smoothed, and its validation loss, as a PNG.

    Raises:
        UserError: a folder without metrics, or a picture that cannot be written.
    """
    histories = [read_metrics(RunFolder(run).metrics_file) for run in runs]
    try:
        with loss_picture(out, "step") as axes:
            for index, (run, records) in enumerate(zip(runs, histories, strict=True)):
                _draw(axes, run.name, records, f"C{index}")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another picture with --out") from None
    return out


@contextmanager
def loss_picture(path: Path, xlabel: str) -> "Iterator[Axes]":
    """Axes to draw losses on, which become a PNG at the end.

    Raises:
        OSError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    try:
        yield axes
        axes.set_xlabel(xlabel)
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path)
    finally:
        plt.close(figure)


def _draw(axes: "Axes", name: str, records: Sequence[dict[str, Any]], color: str) -> None:
    steps = [r["step"] for r in records]
    losses = [r["loss"] for r in records]
    axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=color, linewidth=1.6, label=f"{name}: training (smoothed)")
    held_out = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color=color,
            marker="o",
            markersize=4,
            linestyle="--",
            linewidth=1,
            label=f"{name}: validation ({held_out[-1][1]:.3f} at the end)",
        )


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average, without the bias of its start."""
    keep = 1 - 1 / max(1.0, SMOOTHING_SHARE * len(values))
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed
