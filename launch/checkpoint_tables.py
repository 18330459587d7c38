"""What `plait checkpoint` prints: a run's checkpoints, one of them, two of them side by side."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError, few
from ..parallel.axes import LAYOUT, describe_layout
from ..pretrain.checkpoint import Checkpoint
from ..pretrain.checkpoint.catalogue import Entry, in_order
from ..pretrain.config_file import flatten_config
from ..pretrain.metrics_file import read_metrics
from ..pretrain.readable import readable_size
from ..pretrain.run_folder import RunFolder
from ..pretrain.saved_facts import config_tree
from .whole_tables import plain_table, print_whole

if TYPE_CHECKING:
    from ..pretrain.checkpoint.difference import Difference

__all__ = ["show_checkpoint", "show_difference", "show_list"]

MOST_NAMES = 8
"""Tensors that are named in one list."""


def show_list(folder: RunFolder, entries: list[Entry]) -> None:
    """Print a line a checkpoint, whole or not."""
    whole = in_order(entries)
    losses = _losses(folder)
    table = plain_table("step", "saved", "size", "layout", "tokens", "loss", "state")
    for name in ("step", "size", "tokens", "loss"):
        next(c for c in table.columns if c.header == name).justify = "right"
    for entry in entries:
        checkpoint = entry.checkpoint
        if entry.fault is not None:
            reason = entry.fault.removeprefix(f"{checkpoint.path}").lstrip("/: ").partition("; ")[0]
            table.add_row(str(checkpoint.step), *("",) * 5, f"[red]not whole:[/] {escape(reason)}")
            continue
        manifest = checkpoint.manifest
        tokens, loss = manifest.facts.get("tokens"), losses.get(checkpoint.step)
        table.add_row(
            str(checkpoint.step),
            _time(manifest.saved),
            readable_size(checkpoint.size),
            _layout(checkpoint) or "",
            f"{tokens:,}" if isinstance(tokens, int) else "",
            f"{loss:.4f}" if isinstance(loss, float) else "",
            "whole, [bold]newest[/]" if checkpoint == whole[-1] else "whole",
        )
    console = _console()
    print_whole(console, table)
    for path in sorted(folder.checkpoints.glob(".tmp-*")):
        said = "being written, or left over by a run that died; the next save clears it away"
        console.print(f"{escape(path.name)}: {said}", soft_wrap=True)


def show_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Print a checkpoint's facts, files and groups of tensors."""
    from ..pretrain.checkpoint.difference import group_of

    manifest, console = checkpoint.manifest, _console()
    loss = _losses(folder).get(checkpoint.step)
    facts: dict[str, Any] = {"saved": f"{_time(manifest.saved)}, save number {manifest.serial} of the run"}
    facts["layout"] = _layout(checkpoint)
    facts["pattern"] = flatten_config(_config(checkpoint)).get("model.pattern")
    facts["loss"] = loss
    for key, value in manifest.facts.items():
        if key == "plan" and isinstance(value, dict) and isinstance(value.get("stages"), list):
            count = len(value["stages"])
            value = f"{count} stage{'s' if count != 1 else ''}"
        if key == "schedule" and isinstance(value, dict):
            value = f"after step {value.get('step')}"
        if key == "origin" and isinstance(value, dict):
            value = _origin(value)
        if key not in ("config", "step"):
            facts[key.replace("_", " ")] = f"{value:,}" if type(value) is int else value
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"[bold]step {checkpoint.step}[/] of {escape(str(folder.path))}", soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        if value is not None:
            grid.add_row(escape(str(key)), escape(str(value)))
    console.print(grid)
    console.print()
    files = plain_table("file", "size", "sha256")
    files.columns[1].justify = "right"
    for record in manifest.files.values():
        files.add_row(record.name, readable_size(record.size), escape(f"{record.sha256[:16]}…"))
    print_whole(console, files)
    console.print()
    groups: dict[str, tuple[int, int, set[str]]] = {}
    for name, stored in checkpoint.tensors.items():
        count, size, dtypes = groups.get(group_of(name), (0, 0, set()))
        size += sum(chunk.length for chunk in stored.chunks)
        groups[group_of(name)] = (count + 1, size, dtypes | {str(stored.dtype).removeprefix("torch.")})
    tensors = plain_table("group", "tensors", "size", "dtypes")
    tensors.columns[1].justify = tensors.columns[2].justify = "right"
    for name, (count, size, dtypes) in groups.items():
        tensors.add_row(escape(name), f"{count:,}", readable_size(size), ", ".join(sorted(dtypes)))
    print_whole(console, tensors)


def show_difference(
    first: tuple[RunFolder, Checkpoint], second: tuple[RunFolder, Checkpoint], difference: "Difference"
) -> None:
    """Print how two checkpoints differ."""
    console = _console()
    for sign, (folder, checkpoint) in (("A", first), ("B", second)):
        place = escape(str(folder.path))
        console.print(f"[bold]{sign}[/]  step {checkpoint.step} of {place}", soft_wrap=True)
    console.print()
    ours, theirs = (flatten_config(_config(checkpoint)) for _, checkpoint in (first, second))
    keys = [key for key in [*ours, *(k for k in theirs if k not in ours)] if ours.get(key) != theirs.get(key)]
    if keys:
        table = plain_table("config", "A", "B")
        for key in keys:
            table.add_row(*(escape(str(cell)) for cell in (key, ours.get(key, "-"), theirs.get(key, "-"))))
        print_whole(console, table)
    else:
        console.print("the same config")
    console.print()
    for sign, names in (("A", difference.only_first), ("B", difference.only_second)):
        if names:
            console.print(f"only in {sign}: {escape(few(names, MOST_NAMES))}", soft_wrap=True)
    shapes = [f"{name}, {one} in A and {other} in B" for name, (one, other) in difference.reshaped.items()]
    if shapes:
        console.print(f"other shape or dtype: {escape(few(shapes, MOST_NAMES, '; '))}", soft_wrap=True)
    table = plain_table("group", "tensors", "identical", "|B - A| / |A|", "farthest apart", "by")
    for column in (1, 2, 3, 5):
        table.columns[column].justify = "right"
    for name, group in difference.groups.items():
        far = [escape(group.farthest), f"{group.farthest_relative:.2e}"] if group.farthest else ["", ""]
        relative = f"{group.relative:.2e}" if group.farthest else "0"
        table.add_row(escape(name), f"{group.tensors:,}", f"{group.identical:,}", relative, *far)
    print_whole(console, table)


def _origin(origin: dict[str, Any]) -> str:
    """Where the weights come from, the last place first."""
    imported, fork = origin.get("huggingface"), origin.get("fork")
    parts = [f"forked from step {fork.get('step')} of {fork.get('run')}"] if isinstance(fork, dict) else []
    if "run" in origin:
        parts.append(f"begun with the weights of {origin['run']}")
    if isinstance(imported, dict):
        parts.append(f"imported from {imported.get('folder')}")
    return "; ".join(parts)


def _losses(folder: RunFolder) -> dict[int, Any]:
    try:
        return {record["step"]: record.get("loss") for record in read_metrics(folder.metrics_file)}
    except UserError:
        return {}


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return config_tree(checkpoint)
    except UserError:
        return {}


def _layout(checkpoint: Checkpoint) -> str | None:
    """The layout that a run had; an import has none."""
    sizes = _config(checkpoint).get("parallel")
    if not isinstance(sizes, dict):
        return None
    known = {axis: sizes.get(axis, 1) for axis in LAYOUT}
    return describe_layout(known) if all(type(size) is int for size in known.values()) else None


def _time(moment: datetime) -> str:
    try:
        return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError):  # at the ends of the calendar, which no save is from
        return moment.isoformat()


def _console() -> Console:
    return Console(highlight=False)
