"""`plait checkpoint`: what a run has saved, whether it is intact, and what may go."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from io import TextIOBase

    from ..pretrain.checkpoint import Checkpoint
    from ..pretrain.checkpoint.catalogue import Entry
    from ..pretrain.run_folder import RunFolder

app = typer.Typer(help="List, check, thin out and compare a run's checkpoints.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="RUN[@STEP]", help="A run's folder, for its newest checkpoint, or RUN@STEP.")
]


@app.command("list")
def list_(run: RunArgument) -> None:
    """Print a line a checkpoint: when it was saved, in which layout, how far it was, whether it is whole."""
    from ..pretrain.named_checkpoints import find_entries, named_run
    from .checkpoint_tables import show_list

    folder, step = named_run(run)
    _refuse_step(run, step, "plait checkpoint show")
    show_list(folder, find_entries(folder))


@app.command()
def show(checkpoint: CheckpointArgument) -> None:
    """Print what is known of a checkpoint: facts, versions, files, tensors by group."""
    from ..pretrain.named_checkpoints import find_checkpoint
    from .checkpoint_tables import show_checkpoint

    show_checkpoint(*find_checkpoint(checkpoint))


@app.command()
def verify(
    checkpoint: CheckpointArgument,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run.")] = False,
) -> None:
    """Read every byte of a checkpoint; prints a line a damaged file, and exits with 1 if there is any."""
    from rich.console import Console

    from ..pretrain.named_checkpoints import find_entries, named_run
    from ..pretrain.readable import readable_size

    folder, step = named_run(checkpoint)
    if every and step is not None:
        raise UserError(f"{checkpoint} --all: names one checkpoint and all of them; leave out one of the two")
    entries = find_entries(folder)
    chosen = entries if every else _chosen(entries, step)
    if not chosen:
        steps = ", ".join(str(entry.checkpoint.step) for entry in entries)
        raise UserError(f"{folder.path}: holds no checkpoint of step {step}; choose one of {steps}")
    intact = True
    for entry in chosen:
        one = entry.checkpoint
        with Console(stderr=True).status(f"reading {one.path}"):
            damages = list(one.damages())
        # A whole one under another step's name is read by nobody.
        if not damages and entry.fault is not None:
            damages = [entry.fault]
        if not damages:
            count = len(one.manifest.files) + 1
            typer.echo(f"{one.path}: intact, {count} files, {readable_size(one.size)}")
        for damage in damages:
            typer.echo(damage)
        intact = intact and not damages
    raise typer.Exit(0 if intact else 1)


@app.command()
def prune(
    run: RunArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Those at multiples of so many steps stay too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete older checkpoints, after the newest was read and is intact; damaged ones are left alone."""
    from ..pretrain.checkpoint.catalogue import in_order, superfluous
    from ..pretrain.checkpoint.folders import remove
    from ..pretrain.named_checkpoints import find_entries, named_run
    from ..pretrain.readable import readable_size

    folder, step = named_run(run)
    _refuse_step(run, step, "plait checkpoint list")
    with nullcontext() if dry_run else _locked(folder):
        entries = find_entries(folder)
        for entry in entries:
            if entry.fault is not None:
                typer.echo(f"left alone: {entry.fault}")
        sound = _without_damaged_end(in_order(entries))
        if not sound:
            raise UserError(f"{folder.path}: none of its checkpoints is intact; nothing was deleted")
        doomed = superfluous(sound, keep, keep_every)
        for checkpoint in doomed:
            size = readable_size(checkpoint.size)
            if not dry_run:
                try:
                    remove(checkpoint.path)
                except OSError as error:
                    raise UserError(
                        f"{checkpoint.path}: not deleted: {error.strerror}; mend the permissions"
                    ) from None
            typer.echo(f"{'would delete' if dry_run else 'deleted'} {checkpoint.path}, {size}")
        stay = ", ".join(str(one.step) for one in sound if one not in doomed)
        typer.echo(f"{'would stay' if dry_run else 'stay'}: {stay}; the last of them was read and is intact")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="RUN[@A]", help="A checkpoint.")],
    second: Annotated[str, typer.Argument(metavar="RUN2[@B]", help="Another, perhaps of another run.")],
) -> None:
    """Compare two checkpoints: config keys, tensors, and how far apart each group of tensors is."""
    from rich.console import Console

    from ..pretrain.checkpoint.difference import compare
    from ..pretrain.named_checkpoints import find_checkpoint
    from .checkpoint_tables import show_difference

    ours, theirs = find_checkpoint(first), find_checkpoint(second)
    with Console(stderr=True).status("reading both, tensor by tensor"):
        difference = compare(ours[1], theirs[1])
    show_difference(ours, theirs, difference)


def _locked(folder: "RunFolder") -> "TextIOBase":
    try:
        return folder.lock()
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be locked: {error.strerror}; mend the permissions") from None


def _refuse_step(run: str, step: str | None, command: str) -> None:
    if step is not None:
        raise UserError(
            f"{run}: names a checkpoint, and this is about a run; leave out @{step}, or use {command}"
        )


def _chosen(entries: "list[Entry]", step: str | None) -> "list[Entry]":
    """Those of a step; by default the newest, and what should have been newer and is not whole."""
    from ..pretrain.checkpoint.catalogue import in_order

    if step is not None:
        return [entry for entry in entries if str(entry.checkpoint.step) == step]
    whole = in_order(entries)
    newest = whole[-1].step if whole else -1
    return [
        entry
        for entry in entries
        if entry.checkpoint.step == newest or (entry.fault is not None and entry.checkpoint.step > newest)
    ]


def _without_damaged_end(checkpoints: "list[Checkpoint]") -> "list[Checkpoint]":
    """The checkpoints up to the newest whose every byte is as it was written; says which others are not."""
    from rich.console import Console

    while checkpoints:
        with Console(stderr=True).status(f"reading {checkpoints[-1].path}"):
            damages = list(checkpoints[-1].damages())
        if not damages:
            break
        for damage in damages:
            typer.echo(f"left alone: {damage}")
        checkpoints = checkpoints[:-1]
    return checkpoints
