"""`plait runs`: how runs stand."""

from typing import Annotated

import typer


def runs(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN...]", help="Folders of runs, or folders that hold some; by default runs."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="A list of objects; with --watch a list a line.")
    ] = False,
) -> None:
    """Show how runs stand: state, step, loss, speed, time left, last checkpoint, restarts.

    It only looks, from any host that sees the folders.
    """
    from contextlib import nullcontext, suppress
    from time import sleep

    from ..pretrain.standing import find_runs, standing_of
    from .runs_table import live_table, print_lines, print_table, to_json

    paths = folders or ["runs"]
    if not watch:
        standings = [standing_of(run) for run in find_runs(paths)]
        if as_json:
            typer.echo(to_json(standings, indent=1))
        else:
            print_table(standings)
        return
    with suppress(KeyboardInterrupt), nullcontext() if as_json else live_table() as show:
        while True:
            standings = [standing_of(run) for run in find_runs(paths)]
            if as_json:
                typer.echo(to_json(standings))
            elif show is not None:
                show(standings)
            else:
                print_lines(standings)
            sleep(interval)
