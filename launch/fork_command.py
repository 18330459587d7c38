"""`plait fork`: a run that branches off another."""

from typing import Annotated

import typer

from .config_commands import OverridesArgument


def fork(
    run: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="The run, and the step to branch off at.")],
    new: Annotated[str, typer.Argument(help="The folder of the new run.")],
    overrides: OverridesArgument = None,
) -> None:
    """Make a run that goes on from another's checkpoint with another config; the other one is not touched.

    For a decay off a stable schedule, another blend, or samples to be left out.
    """
    from rich.console import Console
    from rich.markup import escape

    from ..pretrain.fork import fork_run

    console = Console(highlight=False, soft_wrap=True)
    forked = fork_run(run, new, overrides or ())
    place = escape(str(forked.folder.path))
    console.print(f"[bold green]forked[/] step {forked.step} of {escape(run)} to [bold]{place}[/]")
    for key, (before, now) in forked.changes.items():
        console.print(f"  {escape(f'{key}: {before} -> {now}')}")
    start = "launch local" if forked.config.parallel.ranks > 1 else "train"
    console.print(f"go on there: plait {start} {escape(str(forked.folder.config_file))}")
