"""`plait launch`: a run of many ranks."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from . import doctor_commands
from .config_commands import ConfigArgument, OverridesArgument
from .rank_process import STOPPED

app = typer.Typer(help="Train on many ranks.", no_args_is_help=True)


@app.callback()
def _() -> None:
    """Train on many ranks."""


@app.command()
def local(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train on as many ranks of this machine as the layout in `parallel` has.

    Where a rank dies or hangs, all are started again, from the newest checkpoint.
    """
    from ..pretrain.config_file import dump_config, load_config
    from ..pretrain.ranks import device_of
    from ..pretrain.run_folder import RunFolder, read_status
    from .local import launch_ranks

    settings = load_config(config, overrides or ())
    device_of(settings)
    folder = RunFolder(settings.run.dir)
    folder.make()
    with TemporaryDirectory(prefix="plait-") as private:
        # Resolved once: what the ranks read is what was checked here.
        frozen = Path(private) / "config.yaml"
        frozen.write_text(dump_config(settings), encoding="utf-8")
        command = [sys.executable, "-m", "plait.launch", "train", str(frozen)]
        status = launch_ranks(
            command,
            settings.parallel.ranks,
            folder.log_file(0).parent,
            folder.checkpoints,
            settings.launch.max_restarts,
        )
    ended = read_status(folder)
    if status == 0 and ended.get("state") == "stopped" and ended.get("reason"):
        status = STOPPED
    raise typer.Exit(status)


app.command()(doctor_commands.doctor)
