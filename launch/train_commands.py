"""`plait train` and `plait plot`."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .config_commands import ConfigArgument, OverridesArgument


def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a model; where the run's folder holds a checkpoint, go on from the newest."""
    from rich.console import Console

    from ..pretrain.callbacks import Checkpointing, Evaluation, MetricsFile, Progress, TensorBoard
    from ..pretrain.config_file import load_config
    from ..pretrain.run_folder import RunFolder
    from ..pretrain.trainer import Trainer

    settings = load_config(config, overrides or ())
    folder = RunFolder(settings.run.dir)
    folder.make()
    _log_to(folder.log_file(0))
    console = Console(highlight=False)
    recorders = [MetricsFile(), *([TensorBoard()] if settings.log.tensorboard else [])]
    trainer = Trainer(settings, [Evaluation(), *recorders, Progress(console), Checkpointing()])
    finished = trainer.run()
    step = trainer.state.step
    if finished:
        console.print(f"[bold green]finished[/] at step {step}; everything is in {folder.path}")
    else:
        console.print(
            f"[yellow]stopped[/] at step {step} of {settings.train.steps}; the same command goes on"
        )


def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, drawn over each other.")
    ],
    out: Annotated[
        str | None, typer.Option(help="The PNG to write; by default loss.png in the first run.")
    ] = None,
) -> None:
    """Draw the loss of one or several runs."""
    from ..pretrain.plot import plot_losses

    path = Path(out) if out else Path(runs[0]) / "loss.png"
    typer.echo(plot_losses([Path(run) for run in runs], path))


def _log_to(file: Path) -> None:
    """Send the log to a file, and its warnings to the terminal too."""
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("plait: %(message)s"))
    record = logging.FileHandler(file, encoding="utf-8")
    record.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("plait")
    logger.setLevel(logging.INFO)
    logger.handlers = [terminal, record]
