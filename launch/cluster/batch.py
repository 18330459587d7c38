"""The batch script of a job, from its template."""

import shlex
import sys
from pathlib import Path

import jinja2

from ...errors import UserError
from .settings import ClusterSettings

__all__ = ["TEMPLATE", "batch_script", "request"]

TEMPLATE = Path(__file__).with_name("batch.sh.jinja")


def batch_script(settings: ClusterSettings, run: Path, *, gpus: bool) -> str:
    """The script that a job runs.

    Args:
        settings: with `gpus_per_node` resolved.
        run: the run's folder, absolute.
        gpus: whether the ranks have GPUs.

    Raises:
        UserError: the user's template cannot be read or used.
    """
    path = Path(settings.template) if settings.template else TEMPLATE
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["quoted"] = shlex.quote
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
        return template.render(**_values(settings, run, gpus))
    except (OSError, ValueError) as error:
        raise UserError(f"--template = {path}: cannot be read: {error}") from None
    except jinja2.TemplateError as error:
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"--template = {path}: {error.message}{line}") from None


def _values(settings: ClusterSettings, run: Path, gpus: bool) -> dict[str, object]:
    """What a template may use."""
    room = settings.gpus_per_node
    assert room is not None, "submission has resolved it"
    fewest = settings.min_nodes or settings.nodes
    container = ""
    if settings.container:
        image = shlex.quote(settings.container)
        container = f"apptainer exec {settings.container_options} {image} "
    return settings.model_dump() | {
        "run": str(run),
        "name": run.name,
        "log": f"{run}/logs/slurm-%j.log",
        "python": sys.executable,
        "gpus": gpus,
        "node_range": f"{fewest}-{settings.nodes}" if fewest < settings.nodes else str(settings.nodes),
        "options": request(settings, gpus=gpus),
        "signal_before": round(settings.signal_before),
        "container": container,
    }


def request(settings: ClusterSettings, *, gpus: bool) -> list[str]:
    """Options of sbatch and srun that are there only where they were asked for."""
    options = [
        f"--{key}={value}"
        for key in ("partition", "account", "qos", "time", "constraint", "exclude")
        if (value := getattr(settings, key)) is not None
    ]
    if gpus:
        options.append(f"--gpus-per-node={settings.gpus_per_node}")
    if settings.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={settings.cpus_per_rank * (settings.gpus_per_node or 1)}")
    if settings.exclusive:
        options.append("--exclusive")
    return [*options, *settings.sbatch]
