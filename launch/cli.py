"""The `plait` command: one typer application, and one line on standard error for a user's mistake.

Commands import what they need when they run, so that `plait --help` answers at once.
"""

import sys

import typer

from ..errors import UserError
from ..kernels.compile_cache import keep_in
from . import (
    bench_commands,
    checkpoint_commands,
    config_commands,
    data_commands,
    evaluate_command,
    export_command,
    fork_command,
    generate_command,
    import_command,
    launch_commands,
    runs_command,
    train_commands,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="plait",
    help="Pretrain language models that braid Mamba-2, attention and mixture-of-experts layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_commands.app, name="data")
app.add_typer(config_commands.app, name="config")
app.command()(train_commands.train)
app.add_typer(launch_commands.app, name="launch")
app.command()(runs_command.runs)
app.command()(train_commands.plot)
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.command()(fork_command.fork)
app.command()(export_command.export)
app.add_typer(import_command.app, name="import")
app.command()(generate_command.generate)
app.command()(evaluate_command.evaluate)
app.add_typer(bench_commands.app, name="bench")


def main() -> None:
    """Run the command line; exit with 2 and one line where the user can mend what went wrong."""
    try:
        keep_in(None)
        app()
    except UserError as error:
        print(f"plait: error: {error}", file=sys.stderr)
        sys.exit(2)
