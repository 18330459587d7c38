"""What `plait runs` prints: a row a run, or a paragraph a run where the terminal is too narrow for rows."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.text import Text

from ..pretrain.readable import readable_age, readable_count, readable_time
from ..pretrain.standing import Standing
from .whole_tables import WIDEST, plain_table, print_whole

__all__ = ["live_table", "print_lines", "print_table", "to_json"]

STYLES = {
    "running": "green",
    "running?": "yellow",
    "finished": "bold green",
    "stopped": "yellow",
    "failed": "red",
    "died": "red",
}

REASON_WIDTH = 24
"""Fewer columns than these are too narrow for a reason."""

Show = Callable[[Sequence[Standing]], None]


def print_table(standings: Sequence[Standing]) -> None:
    """Print how runs stand, and leave nothing out."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(_fitting(standings, console))
    else:
        print_whole(console, _table(standings))


def print_lines(standings: Sequence[Standing]) -> None:
    """Print a line a run, with the time."""
    now = datetime.now().isoformat(" ", "seconds")
    for standing in standings:
        reason = [f"({standing.reason})"] if standing.reason else []
        typer.echo("  ".join([now, standing.run, standing.state, *_words(standing), *reason]))


def to_json(standings: Sequence[Standing], indent: int | None = None) -> str:
    """A list of objects, with null for what is not known or no number."""
    rows = [{key: _finite(value) for key, value in asdict(one).items()} for one in standings]
    return json.dumps(rows, indent=indent)


@contextmanager
def live_table() -> Iterator[Show | None]:
    """What shows runs in a terminal's whole window until the context ends, and then leaves them on it;
    None where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        yield None
        return
    last: list[Standing] = []
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:

            def show(standings: Sequence[Standing]) -> None:
                last[:] = standings
                live.update(_window(standings, console), refresh=True)

            yield show
    finally:
        if last:
            print_table(last)


def _window(standings: Sequence[Standing], console: Console) -> RenderableType:
    """As many runs as a window has lines for, under the time; if not all, those that run first."""
    now = Text(f"{datetime.now().isoformat(' ', 'seconds')}, Ctrl-C ends", style="dim")
    shown = list(standings)
    while True:
        hidden = len(standings) - len(shown)
        foot = [Text(f"and {hidden} more; a higher window shows them", style="dim")] if hidden else []
        window = Group(now, _fitting(shown, console), *foot)
        excess = len(console.render_lines(window, pad=False)) - console.height
        if excess <= 0 or not shown:
            return window
        if not hidden:
            shown.sort(key=lambda standing: not standing.state.startswith("running"))
        del shown[-(excess // 6 + 1) :]


def _fitting(standings: Sequence[Standing], console: Console) -> RenderableType:
    """A table, if the terminal is wide enough for it, else paragraphs."""
    bare = _table(standings, reasons=False)
    needed = Measurement.get(console, console.options.update(width=WIDEST), bare).maximum
    if any(standing.reason for standing in standings):
        needed += REASON_WIDTH
    if needed <= console.width:
        return _table(standings)
    return Group(*map(_paragraph, standings))


def _table(standings: Sequence[Standing], *, reasons: bool = True) -> RenderableType:
    headers = [
        "run",
        "state",
        "step",
        "loss",
        "validation",
        "tok/s",
        "left",
        "checkpoint",
        "restarts",
        "quiet",
    ]
    reasons = reasons and any(standing.reason for standing in standings)
    table = plain_table(*headers, *(["reason"] if reasons else []))
    for column in table.columns[2:7] + table.columns[8:10]:
        column.justify = "right"
    if reasons:
        table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    for standing in standings:
        cells = [Text(standing.run), _state(standing), *(Text(cell) for cell in _cells(standing).values())]
        table.add_row(*cells, *([Text(standing.reason or "")] if reasons else []))
    return table


def _paragraph(standing: Standing) -> RenderableType:
    lines: list[RenderableType] = [Text(f"{standing.run}  ", overflow="fold") + _state(standing)]
    lines.append(Padding(Columns(map(Text, _words(standing)), padding=(0, 2)), (0, 0, 0, 2)))
    if standing.reason:
        lines.append(Padding(Text(standing.reason, overflow="fold"), (0, 0, 0, 2)))
    return Group(*lines)


def _state(standing: Standing) -> Text:
    return Text(standing.state, style=STYLES.get(standing.state, "cyan"))


def _words(standing: Standing) -> list[str]:
    """What the cells say, each with its name."""
    return [f"{name} {cell}" for name, cell in _cells(standing).items() if cell]


def _cells(standing: Standing) -> dict[str, str]:
    """Name -> what a person reads; empty for what is not known."""
    one = standing
    step = "" if one.step is None else str(one.step)
    saved = "" if one.checkpoint is None else str(one.checkpoint)
    if one.checkpoint_age is not None:
        saved += f", {readable_age(one.checkpoint_age)} ago"
    return {
        "step": f"{step or '-'}/{one.steps}" if one.steps is not None else step,
        "loss": _number(one.loss, lambda loss: f"{loss:.4f}"),
        "validation": _number(one.validation_loss, lambda loss: f"{loss:.4f}"),
        "tok/s": _number(one.tokens_per_second, readable_count),
        "left": _number(one.seconds_left, readable_time),
        "checkpoint": saved,
        "restarts": "" if one.restarts is None else str(one.restarts),
        "quiet": _number(one.quiet, readable_age),
    }


def _number(value: float | None, say: Callable[[float], str]) -> str:
    return "" if value is None else say(value) if math.isfinite(value) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
