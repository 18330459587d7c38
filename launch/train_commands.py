"""`plait train` and `plait plot`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .config_commands import ConfigArgument, OverridesArgument
from .rank_process import STOPPED, is_launched, life, log_to, logger, rank, run_as_rank, seconds_since_launch

if TYPE_CHECKING:
    from ..pretrain.callbacks import Callback
    from .stop_signals import StopSignals


def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a model; where the run's folder holds a checkpoint, go on from the newest.

    Started by torchrun or `plait launch`, this is one rank of many.
    """
    run_as_rank(lambda signals: _train(config, overrides, signals))


def _train(config: str, overrides: list[str] | None, signals: "StopSignals") -> None:
    from rich.console import Console

    from ..kernels.compile_cache import keep_in
    from ..parallel.failures import failure_of
    from ..parallel.processes import start_processes, stop_processes
    from ..parallel.watchdog import Watchdog
    from ..pretrain.callbacks import (
        Checkpointing,
        Evaluation,
        Heartbeat,
        MetricsFile,
        Progress,
        RunLog,
        TensorBoard,
    )
    from ..pretrain.config_file import load_config
    from ..pretrain.ranks import device_of
    from ..pretrain.run_folder import RunFolder
    from ..pretrain.run_log import FAILED
    from ..pretrain.trainer import Trainer
    from .lives import begin_under_torchrun

    settings = load_config(config, overrides or ())
    keep_in(settings.train.kernel_cache)
    device = device_of(settings)
    folder = RunFolder(settings.run.dir)
    folder.make()
    log = folder.log_file(rank())
    log_to(log)
    if life():
        logger.info("restart %d of this launch", life())
    spent = seconds_since_launch()
    if rank() == 0 and "TORCHELASTIC_RUN_ID" in os.environ and not is_launched():
        spent = begin_under_torchrun(folder, settings.launch.max_restarts)
    console = Console(highlight=False, quiet=rank() > 0)
    timeout = settings.parallel.timeout
    with Watchdog(timeout, log, launched=is_launched()) as watchdog:
        if "RANK" in os.environ:
            start_processes(device, timeout)
        watchdog.beat("the processes' start")
        callbacks: list[Callback] = [Heartbeat(watchdog), Evaluation(watchdog.beat)]
        if rank() == 0:
            callbacks += [MetricsFile(), *([TensorBoard()] if settings.log.tensorboard else [])]
            callbacks += [RunLog(), Progress(console)]
        callbacks += [Checkpointing(), Heartbeat(watchdog, "the callbacks of ")]
        trainer = Trainer(settings, callbacks, lambda: signals.asked)
        trainer.stopping.spent(spent)
        try:
            finished = trainer.run()
        except BaseException as error:
            # `plait launch`, which knows how all ranks ended, tells of it itself.
            if not is_launched():
                trainer.say(FAILED + failure_of(error, rank())[0].message)
            raise
        stop_processes()
    step, steps, reason = trainer.state.step, settings.train.steps, trainer.stopping.reason
    if finished:
        console.print(f"[bold green]finished[/] at step {step}; everything is in {folder.path}")
    else:
        why = f": {reason}" if reason else ""
        console.print(f"[yellow]stopped[/] at step {step} of {steps}{why}; the same command goes on")
    # torchrun would take any other status for a failure, and start the ranks anew.
    if reason and not finished and "RANK" not in os.environ:
        raise typer.Exit(STOPPED)


def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, drawn over each other.")
    ],
    out: Annotated[
        str | None,
        typer.Option(help="The PNG to write; by default loss.png, or METRIC.png, in the first run."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Draw this key of metrics.jsonl; of a list, a line for each layer."),
    ] = None,
) -> None:
    """Draw the loss, or another metric, of one or several runs."""
    from ..pretrain.plot import plot_losses, plot_metric

    folders = [Path(run) for run in runs]
    path = Path(out) if out else folders[0] / f"{metric or 'loss'}.png"
    typer.echo(plot_losses(folders, path) if metric is None else plot_metric(folders, metric, path))
