"""A run into a cluster's queue: checked here, frozen in its folder, written down."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ...pretrain.config import Config
from ...pretrain.config_file import dump_config
from ...pretrain.fallback_layout import start_on
from ...pretrain.run_checks import check_run
from ...pretrain.run_folder import RunFolder
from . import slurm
from .batch import batch_script
from .jobs import FROZEN_CONFIG, launch_folder, numbers_of, record_submission
from .settings import ClusterSettings

__all__ = [
    "Prepared",
    "freeze",
    "prepare",
    "resolved",
    "submit",
    "torchrun_commands",
]

SCRIPT = "batch.sh"
ENVIRONMENT = "env.sh"

DEFAULT_PORT = 29500
"""Where torchrun meets, by custom."""


@dataclass(frozen=True)
class Prepared:
    """What would run."""

    settings: ClusterSettings
    config: Config
    run: Path
    """The run's folder, absolute."""
    script: str | None
    """None on bare machines."""

    @property
    def launch(self) -> Path:
        return launch_folder(self.run)

    @property
    def command(self) -> list[str]:
        """How sbatch is called."""
        return ["sbatch", f"--chdir={Path.cwd()}", str(self.launch / SCRIPT)]


def resolved(settings: ClusterSettings, config: Config) -> ClusterSettings:
    """The settings with what the layout decides; it has to fill the nodes.

    Raises:
        UserError: the layout has another number of ranks, or the fewest nodes hold no layout.
    """
    ranks, nodes = config.parallel.ranks, settings.nodes
    room = settings.gpus_per_node
    if room is None:
        if ranks % nodes:
            raise UserError(
                f"--nodes = {nodes} does not divide the {ranks} ranks of parallel; choose another number of "
                "nodes, or say --gpus-per-node"
            )
        room = ranks // nodes
    start = start_on(config, nodes, room)
    spare = settings.exclude_bad_nodes and settings.self_test
    if start.fallback is not None or (start.nodes < nodes and not spare):
        raise UserError(
            f"--nodes = {nodes} and --gpus-per-node = {room} are {nodes * room} ranks, but parallel has "
            f"{ranks}; make them equal (spare nodes go with --exclude-bad-nodes)"
        )
    if settings.min_nodes is not None and settings.min_nodes < start.nodes:
        start_on(config, settings.min_nodes, room)
    return settings.model_copy(update={"gpus_per_node": room})


def prepare(settings: ClusterSettings, config: Config) -> Prepared:
    """Check all that can be checked before a job waits for hours.

    Raises:
        UserError: a mistake in the options, the config, or what it names.
    """
    settings = resolved(settings, config)
    run = Path(config.run.dir).absolute()
    if settings.env_file is not None and not Path(settings.env_file).is_file():
        raise UserError(f"--env-file = {settings.env_file}: no such file")
    if settings.container is not None and not Path(settings.container).exists():
        raise UserError(f"--container = {settings.container}: no such image")
    return Prepared(settings, config, run, batch_script(settings, run, gpus=config.train.device != "cpu"))


def freeze(prepared: Prepared) -> None:
    """Write what runs into the run's folder.

    Raises:
        UserError: it cannot be written.
    """
    RunFolder(prepared.run).make()
    folder = launch_folder(prepared.run)
    try:
        folder.mkdir(exist_ok=True)
        (folder / FROZEN_CONFIG).write_text(dump_config(_absolute(prepared.config)), encoding="utf-8")
        if prepared.script is not None:
            script = folder / SCRIPT
            script.write_text(prepared.script, encoding="utf-8")
            script.chmod(0o755)
        if prepared.settings.env_file is not None:
            shutil.copyfile(prepared.settings.env_file, folder / ENVIRONMENT)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another run.dir") from None


def submit(prepared: Prepared) -> list[int]:
    """Check it against data and checkpoints, freeze it, put it into the queue; returns the jobs' numbers.

    Raises:
        UserError: a job of the run is in the queue, the run would end at its start, or Slurm refuses.
    """
    waiting = slurm.jobs_in_queue(numbers_of(prepared.run))
    if waiting:
        raise UserError(
            f"{prepared.run}: its job {waiting[0].number} is {waiting[0].state.lower()}; wait for it, or "
            f"`plait launch cancel {prepared.run}`"
        )
    check_run(prepared.config)
    freeze(prepared)
    script = str(launch_folder(prepared.run) / SCRIPT)
    jobs: list[int] = []
    try:
        for _ in range(prepared.settings.chain):
            options = [f"--chdir={Path.cwd()}"]
            if jobs:
                options.append(f"--dependency=afterany:{jobs[-1]}")
            jobs.append(slurm.submit(script, options))
    except UserError:
        slurm.cancel(jobs)
        raise
    settings = prepared.settings
    record_submission(prepared.run, jobs, settings.nodes, settings.gpus_per_node or 1)
    return jobs


def torchrun_commands(
    config: Config, nodes: int, gpus_per_node: int | None, rendezvous: str | None
) -> Iterator[str | list[str]]:
    """Freeze a config for bare machines, and say how to start it: a remark, then the command for each.

    Raises:
        UserError: the layout does not fill the machines, no place to meet is named, or the run's config or
            folder is wrong.
    """
    settings = resolved(ClusterSettings(nodes=nodes, gpus_per_node=gpus_per_node), config)
    if nodes > 1 and rendezvous is None:
        raise UserError(
            "--rendezvous is not set; name the first of the machines as the others reach it, such as "
            "--rendezvous node1:29500"
        )
    check_run(config)
    run = Path(config.run.dir).absolute()
    freeze(Prepared(settings, config, run, script=None))
    where = f"on each of the {nodes} machines, in {Path.cwd()}:" if nodes > 1 else "here:"
    yield f"# {where}"
    meeting = ["--standalone"]
    if nodes > 1:
        host, _, port = str(rendezvous).partition(":")
        meeting = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", run.name]
        meeting += ["--rdzv-endpoint", f"{host}:{port or DEFAULT_PORT}"]
    yield [
        # Without it the ranks of a second life look for those of the first.
        *(["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if nodes > 1 else []),
        *(sys.executable, "-m", "torch.distributed.run", *meeting),
        *("--nproc-per-node", str(settings.gpus_per_node), "--max-restarts", "100"),
        *("-m", "plait.launch", "train", str(launch_folder(run) / FROZEN_CONFIG)),
    ]


def _absolute(config: Config) -> Config:
    """The config with the run's folder by its whole path; other paths are read from where the job is
    submitted, in which it runs."""
    tree = config.model_dump(mode="json", by_alias=True)
    tree["run"]["dir"] = str(Path(config.run.dir).absolute())
    return Config.model_validate(tree)
