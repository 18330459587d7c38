"""Pictures of runs: their losses over each other, any metric, and the frame of every such picture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .layer_metrics import layers_of
from .metrics_file import read_metrics
from .run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["loss_picture", "plot_losses", "plot_metric"]

Records = Sequence[dict[str, Any]]

SMOOTHING_SHARE = 0.04
"""The smoothed curve averages, with a fading weight, over this share of a run's steps."""

MOST_NAMED = 10
"""Curves of a panel that are told apart by name; more run through a scale of colours."""

FEW_POINTS = 30
"""Up to so many are marked, so that a single one is seen too."""


@dataclass(frozen=True)
class Curve:
    name: str
    steps: list[int]
    values: list[float]


def plot_losses(runs: Sequence[Path], out: Path) -> Path:
    """Draw each run's training loss, thin and smoothed, and its validation loss, as a PNG.

    Raises:
        UserError: a folder without metrics, or a picture that cannot be written.
    """
    histories = [read_metrics(RunFolder(run).metrics_file) for run in runs]
    with _written(out), loss_picture(out, "step") as axes:
        for index, (run, records) in enumerate(zip(runs, histories, strict=True)):
            _draw_losses(axes, run.name, records, f"C{index}")
    return out


def plot_metric(runs: Sequence[Path], metric: str, out: Path) -> Path:
    """Draw a metric of metrics.jsonl as a PNG.

    A number is a line a run. What has several numbers, of layers or sources, has a line for each, in a
    panel a run.

    Raises:
        UserError: a folder without metrics or without this one, or a picture that cannot be written.
    """
    histories = [read_metrics(RunFolder(run).metrics_file) for run in runs]
    found = [_curves(run, records, metric) for run, records in zip(runs, histories, strict=True)]
    single = all(len(curves) == 1 for curves in found)
    with _written(out), _picture(out, "step", metric, 1 if single else len(runs)) as panels:
        if single:
            named = [
                replace(curve, name=f"{run.name}, {curve.name}" if curve.name else run.name)
                for run, [curve] in zip(runs, found, strict=True)
            ]
            _draw_curves(panels[0], named, name_all=True)
        else:
            for axes, run, curves in zip(panels, runs, found, strict=True):
                _draw_curves(axes, curves, name_all=False)
                axes.set_title(run.name)
    return out


@contextmanager
def loss_picture(path: Path, xlabel: str) -> "Iterator[Axes]":
    """Axes to draw losses on, which become a PNG at the end.

    Raises:
        OSError: the picture cannot be written.
    """
    with _picture(path, xlabel, "loss (nats a token)", 1) as (axes,):
        yield axes


@contextmanager
def _picture(path: Path, xlabel: str, ylabel: str, panels: int) -> "Iterator[list[Axes]]":
    """Panels one under another, on the same scales."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (8, 1.5 + 3 * panels)
    figure, grid = plt.subplots(
        panels, figsize=size, dpi=150, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    several = list(grid[:, 0])
    try:
        yield several
        several[-1].set_xlabel(xlabel)
        for axes in several:
            axes.set_ylabel(ylabel)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(path)
    finally:
        plt.close(figure)


@contextmanager
def _written(out: Path) -> Iterator[None]:
    from matplotlib.backend_bases import FigureCanvasBase

    kind = out.suffix.removeprefix(".").lower()
    if kind and kind not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{out}: no picture can be written as .{kind}; name a .png with --out")
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another picture with --out") from None


def _curves(run: Path, records: Records, metric: str) -> list[Curve]:
    """What the run has of a metric: a curve without a name, or one for each layer or source.

    Raises:
        UserError: it has nothing of it.
    """
    history = [(r["step"], r[metric]) for r in records if metric in r]
    if not history or metric == "step":
        known = sorted({name for record in records for name in record} - {"step"})
        raise UserError(f"--metric {metric}: {run} has no such metric; name one of {', '.join(known)}")
    if isinstance(history[0][1], list):
        layers = layers_of(metric, RunFolder.open(run).config().model)
        names = [f"layer {layer}" for layer in layers]
        # A folder may hold steps of a model that died before its first checkpoint: of other layers.
        history = [(step, dict(zip(names, values, strict=False))) for step, values in history]
    elif not isinstance(history[0][1], dict):
        history = [(step, {"": value}) for step, value in history]
    curves: dict[str, Curve] = {}
    for step, values in history:
        for name, value in values.items():
            curve = curves.setdefault(name, Curve(name, [], []))
            curve.steps.append(step)
            curve.values.append(value)
    return list(curves.values())


def _draw_curves(axes: "Axes", curves: Sequence[Curve], *, name_all: bool) -> None:
    """Few in colours of their own; many that need not all be named, through a scale from first to last."""
    from matplotlib import colormaps

    last = len(curves) - 1
    scaled = len(curves) > MOST_NAMED and not name_all
    for index, curve in enumerate(curves):
        axes.plot(
            curve.steps,
            curve.values,
            color=colormaps["viridis"](0.95 * index / last) if scaled else f"C{index}",
            linewidth=0.8 if scaled else 1.2,
            marker="o" if len(curve.steps) <= FEW_POINTS else None,
            markersize=4,
            label=curve.name if not scaled or index in (0, last) else None,
        )


def _draw_losses(axes: "Axes", name: str, records: Records, color: str) -> None:
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
