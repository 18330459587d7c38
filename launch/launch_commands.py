"""`plait launch`: a run of many ranks, on this machine, on bare machines, on a cluster."""

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from . import cluster_commands, doctor_commands
from .config_commands import ConfigArgument, OverridesArgument
from .rank_process import STOPPED

app = typer.Typer(help="Train on many ranks.", no_args_is_help=True)

NodesOption = Annotated[int, typer.Option(min=1, help="Machines.")]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Ranks of a machine, and its GPUs; by default what the layout needs, or the GPUs there are.",
    ),
]


@app.callback()
def _() -> None:
    """Train on many ranks."""


@app.command()
def local(
    config: ConfigArgument, overrides: OverridesArgument = None, gpus_per_node: GpusOption = None
) -> None:
    """Train on as many ranks of this machine as the layout in `parallel` has.

    Where a rank dies or hangs, all are started again, from the newest checkpoint. Where this machine has
    fewer GPUs than the layout needs ranks, the first of `launch.fallback_layouts` that fits is taken.
    """
    from ..pretrain.config_file import dump_config, load_config
    from ..pretrain.fallback_layout import start_on
    from ..pretrain.ranks import device_of
    from ..pretrain.run_folder import RunFolder, read_status
    from .local import launch_ranks

    settings = load_config(config, overrides or ())
    device = device_of(settings)
    ranks = settings.parallel.ranks
    if gpus_per_node is None and device.type == "cuda" and settings.launch.fallback_layouts:
        import torch

        gpus_per_node = torch.cuda.device_count()
    if gpus_per_node is not None:
        ranks = start_on(settings, 1, gpus_per_node).ranks_a_node
    folder = RunFolder(settings.run.dir)
    folder.make()
    with TemporaryDirectory(prefix="plait-") as private:
        # Resolved once: what the ranks read is what was checked here.
        frozen = Path(private) / "config.yaml"
        frozen.write_text(dump_config(settings), encoding="utf-8")
        command = [sys.executable, "-m", "plait.launch", "train", str(frozen)]
        status = launch_ranks(
            command,
            ranks,
            folder.log_file(0).parent,
            folder.checkpoints,
            settings.launch.max_restarts,
        )
    ended = read_status(folder)
    if status == 0 and ended.get("state") == "stopped" and ended.get("reason"):
        status = STOPPED
    raise typer.Exit(status)


@app.command()
def torchrun(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: NodesOption = 1,
    gpus_per_node: GpusOption = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="The first of the machines, as the others reach it."),
    ] = None,
) -> None:
    """Print the command that starts a run on bare machines, to be run on each of them.

    The config is checked and frozen in the run's folder, which all of them have to see.
    """
    from ..pretrain.config_file import load_config
    from .cluster.submission import torchrun_commands

    settings = load_config(config, overrides or ())
    for line in torchrun_commands(settings, nodes, gpus_per_node, rendezvous):
        typer.echo(line if isinstance(line, str) else shlex.join(line), err=isinstance(line, str))


app.command()(cluster_commands.slurm)
app.command()(cluster_commands.status)
app.command()(cluster_commands.logs)
app.command()(cluster_commands.cancel)
app.command()(cluster_commands.show)
app.command()(doctor_commands.doctor)
