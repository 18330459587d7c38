"""What is asked of a cluster: defaults in one user's file, and over them the options of one command."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError

from ...errors import UserError
from ...pretrain.config_section import Count, Duration, Section

__all__ = ["ClusterSettings", "cluster_file", "load_settings"]

SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
HOURS = re.compile(r"(\d+[dhms])+")


def _slurm_time(text: str) -> str:
    """Slurm's own spelling, D-HH:MM:SS, also of 11h50m."""
    if SLURM_TIME.fullmatch(text):
        return text
    if not HOURS.fullmatch(text):
        raise ValueError(f"time = {text}: give it as Slurm does, 1-00:00:00 or 90 (minutes), or as 11h50m")
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    seconds = sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])", text))
    days, seconds = divmod(seconds, 86400)
    return f"{days}-{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is empty or more than a line")
    return text


def _word(text: str) -> str:
    """What stands in a line of #SBATCH without quotes."""
    if not re.fullmatch(r"[\w.,:;&|*()\[\]@/+=%-]+", text):
        raise ValueError(f"{text!r} is no word that Slurm takes")
    return text


Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_one_line)]


class ClusterSettings(Section):
    """Each is an option of `plait launch slurm` and a key of the cluster file."""

    nodes: Count = 1
    """Nodes of a job."""
    min_nodes: Count | None = None
    """Fewer nodes that the job may start with, in one of `launch.fallback_layouts`; null means `nodes`."""
    gpus_per_node: Count | None = None
    """Ranks of a node, and its GPUs unless `train.device` is cpu; null means as many as the layout needs."""
    cpus_per_rank: Count | None = None
    """Cores of a rank; null leaves them to the cluster's default, or with `exclusive` to the node."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Annotated[str, AfterValidator(_slurm_time)] | None = None
    """Time limit, as 1-00:00:00, 90 (minutes) or 11h50m; null is the partition's."""
    constraint: Word | None = None
    """Features of nodes."""
    exclude: Word | None = None
    """Nodes never to be used."""
    exclusive: bool = True
    """Whole nodes."""
    signal_before: Duration = 300.0
    """Seconds, or as in 5m, between the signal to save and the time limit. A step and a save must fit."""
    requeue: bool = True
    """Whether a job that was stopped by the cluster goes back into the queue by itself."""
    chain: Count = 1
    """Jobs to submit, each after the one before: for those who may not requeue."""
    container: Line | None = None
    """An Apptainer image in which the ranks run."""
    container_options: Line = "--nv"
    """Options of `apptainer exec`."""
    env_file: Line | None = None
    """A shell file that each node reads before its ranks start, such as module loads; it is copied."""
    interface: Word | None = None
    """The network interface that NCCL and gloo use, such as ib0; null lets them look."""
    template: Line | None = None
    """A batch script template in the place of plait's own; `plait launch show --template` prints that."""
    self_test: bool = True
    """Test every node before each start."""
    exclude_bad_nodes: bool = False
    """Start without nodes that fail the test, where `launch.fallback_layouts` or spare nodes allow it."""
    slow: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """A node that is slower than so much of the others' speed fails the test; 0 asks nothing of its speed."""
    sbatch: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """More options of sbatch, a line each, such as --mail-type=END."""


def cluster_file() -> Path:
    """Where a user's defaults are: `plait/cluster.yaml` in the folder of the user's configuration."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "plait" / "cluster.yaml"


def load_settings(options: Mapping[str, Any]) -> tuple[ClusterSettings, dict[str, str]]:
    """The settings that hold.

    Args:
        options: of the command, by key; None where an option was not given.

    Returns:
        the settings, and for each key that was set whether by an "option" or by the "file".

    Raises:
        UserError: the file is not YAML or has an unknown key, or a value does not fit.
    """
    file = cluster_file()
    defaults = _read(file)
    given = {key: value for key, value in options.items() if value is not None and value != []}
    origins = dict.fromkeys(defaults, "file") | dict.fromkeys(given, "option")
    try:
        settings = ClusterSettings.model_validate(defaults | given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        name = str(detail["loc"][0])
        where = f"--{name.replace('_', '-')}" if name in given else f"{file}: {key}"
        if detail["type"] == "extra_forbidden":
            raise UserError(
                f"{file}: {key} is not a key; `plait launch show` prints those that are"
            ) from None
        cause = detail.get("ctx", {}).get("error")
        message = str(cause or f"give {detail['msg'].removeprefix('Input should be ')}")
        raise UserError(f"{where} = {detail['input']}: {message}") from None
    if settings.min_nodes is not None and settings.min_nodes > settings.nodes:
        raise UserError(f"--min-nodes = {settings.min_nodes} exceeds --nodes = {settings.nodes}; lower it")
    return settings, origins


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds {type(tree).__name__}, not keys such as 'partition: gpu'")
    return tree
