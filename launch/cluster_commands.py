"""`plait launch slurm|status|logs|cancel|show`, and what a job asks of plait itself."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .config_commands import ConfigArgument, OverridesArgument

if TYPE_CHECKING:
    from .cluster.slurm import Job

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder.")]

job_app = typer.Typer(hidden=True, help="What a job on a cluster asks.")


def slurm(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the job.")] = None,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Fewer that it may start with, in a fallback layout.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks of a node, and its GPUs.")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="Cores of a rank.")] = None,
    partition: Annotated[str | None, typer.Option(help="Where the job waits.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: 1-00:00:00, 90 (minutes), 11h50m.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features of nodes.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes never to be used.")] = None,
    exclusive: Annotated[bool | None, typer.Option(help="Whole nodes.")] = None,
    signal_before: Annotated[
        str | None, typer.Option(help="From the signal to save to the time limit, such as 5m.")
    ] = None,
    requeue: Annotated[
        bool | None, typer.Option(help="Let a job that the cluster stopped go back into the queue.")
    ] = None,
    chain: Annotated[int | None, typer.Option(min=1, help="Jobs, each after the one before.")] = None,
    container: Annotated[str | None, typer.Option(help="An Apptainer image for the ranks.")] = None,
    container_options: Annotated[str | None, typer.Option(help="Options of apptainer exec.")] = None,
    env_file: Annotated[str | None, typer.Option(help="A shell file that each node reads first.")] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface of NCCL and gloo.")] = None,
    template: Annotated[str | None, typer.Option(help="A batch script template of your own.")] = None,
    self_test: Annotated[bool | None, typer.Option(help="Test every node before each start.")] = None,
    exclude_bad_nodes: Annotated[bool | None, typer.Option(help="Start without nodes that fail it.")] = None,
    slow: Annotated[float | None, typer.Option(help="Share of the others' speed that fails it.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="One more of sbatch's, such as --mail-type=END."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would run.")] = False,
) -> None:
    """Submit a run to a Slurm cluster; before it is stopped it saves, goes back into the queue, and goes on.

    What is not given here is taken from the cluster file, which `plait launch show` prints. The config is
    checked here, and frozen in the run's folder.
    """
    options = {key: value for key, value in locals().items() if key not in ("config", "overrides", "dry_run")}
    from ..pretrain.config_file import dump_config, load_config
    from .cluster.settings import load_settings
    from .cluster.submission import prepare, submit

    settings, _ = load_settings(options)
    prepared = prepare(settings, load_config(config, overrides or ()))
    if dry_run:
        typer.echo(f"# {shlex.join(prepared.command)}\n\n{prepared.script}")
        typer.echo(f"# {prepared.launch / 'config.yaml'}\n\n{dump_config(prepared.config)}", nl=False)
        return
    jobs = submit(prepared)
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {jobs[0]} to {jobs[-1]}, one after the other"
    run = config_folder(prepared.run)
    typer.echo(f"submitted {what}: {run} on {settings.nodes} node{'s' if settings.nodes > 1 else ''}")
    typer.echo(f"plait launch status {run}; plait launch logs {run} --follow; plait launch cancel {run}")


def status(run: RunArgument) -> None:
    """Show a run's jobs in the queue, and how the run stands."""
    from rich.console import Console

    from ..pretrain.run_folder import RunFolder
    from ..pretrain.standing import standing_of
    from .cluster.jobs import numbers_of
    from .cluster.slurm import jobs_in_queue
    from .runs_table import print_table
    from .whole_tables import plain_table, print_whole

    folder = RunFolder.open(run)
    jobs = jobs_in_queue(numbers_of(folder.path))
    if jobs:
        table = plain_table("job", "state", "for", "left", "nodes", "on", "why it waits")
        for job in jobs:
            table.add_row(*_row(job))
        print_whole(Console(highlight=False), table)
    else:
        typer.echo("no job of this run is in the queue")
    typer.echo()
    print_table([standing_of(folder)])


def _row(job: "Job") -> list[str]:
    reason = "" if job.reason == "None" else job.reason
    if job.state == "PENDING" and job.start not in ("N/A", ""):
        reason += f", expected {job.start.replace('T', ' ')}"
    return [
        *(str(job.number), job.state.lower(), job.used, job.left),
        *(str(job.nodes), job.names, reason),
    ]


def logs(
    run: RunArgument,
    rank: Annotated[int | None, typer.Option(min=0, help="The log of a rank; by default the job's.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing, until Ctrl-C.")] = False,
) -> None:
    """Print the end of a run's log: what its newest job printed, or what a rank noted."""
    from ..pretrain.run_folder import RunFolder
    from .cluster.jobs import numbers_of
    from .log_tail import follow_file, print_tail

    folder = RunFolder.open(run)
    file = folder.log_file(rank or 0)
    if rank is None and (numbers := numbers_of(folder.path)):
        written = [folder.job_log(number) for number in numbers if folder.job_log(number).exists()]
        file = written[-1] if written else folder.job_log(numbers[-1])
    place = print_tail(file, lines)
    if follow:
        follow_file(file, place)


def cancel(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a step and a checkpoint.")] = False,
    pending: Annotated[bool, typer.Option("--pending", help="Only jobs that have not begun.")] = False,
) -> None:
    """End a run's jobs: those that wait leave the queue, the one that runs saves and stops."""
    from ..pretrain.run_folder import RunFolder
    from .cluster import slurm as queue
    from .cluster.jobs import numbers_of

    folder = RunFolder.open(run)
    jobs = queue.jobs_in_queue(numbers_of(folder.path))
    begun = [job.number for job in jobs if job.state != "PENDING"]
    waiting = [job.number for job in jobs if job.state == "PENDING"]
    queue.cancel(waiting)
    for number in waiting:
        typer.echo(f"job {number} has left the queue")
    if pending:
        return
    if now:
        queue.cancel(begun)
    elif begun:
        folder.stop_file.touch()
    for number in begun:
        how = "is ended" if now else "stops after its step, with a checkpoint; --now does not wait for that"
        typer.echo(f"job {number} {how}")
    if not jobs:
        typer.echo("no job of this run is in the queue")


def show(
    as_template: Annotated[
        bool, typer.Option("--template", help="Print plait's own batch script template.")
    ] = False,
) -> None:
    """Print what `plait launch slurm` asks for where no option says otherwise, and where that comes from."""
    from rich.console import Console

    from .cluster.batch import TEMPLATE
    from .cluster.settings import ClusterSettings, cluster_file, load_settings
    from .whole_tables import plain_table, print_whole

    if as_template:
        typer.echo(TEMPLATE.read_text(encoding="utf-8"), nl=False)
        return
    settings, origins = load_settings({})
    file = cluster_file()
    typer.echo(
        f"{file}: {'read' if file.exists() else 'there is none; a key of this table a line makes one'}\n"
    )
    table = plain_table("key", "value", "from", "meaning")
    for key, field in ClusterSettings.model_fields.items():
        value = getattr(settings, key)
        shown = "" if value in (None, ()) else value if isinstance(value, str) else json.dumps(value)
        meaning = " ".join((field.description or "").split())
        table.add_row(key, shown, "file" if key in origins else "default", meaning)
    print_whole(Console(highlight=False), table)


@job_app.command("begin")
def job_begin(
    run: RunArgument,
    job: Annotated[str, typer.Option()],
    nodes: Annotated[str, typer.Option(help="Names, with commas.")],
    gpus_per_node: Annotated[int, typer.Option(min=1)],
) -> None:
    """Print how many nodes the next life is started on, ranks on each, and their names."""
    from .cluster.lives_of_job import DONE, begin_life

    found = begin_life(Path(run), job, nodes.split(","), gpus_per_node)
    if found is None:
        typer.echo("plait: the run is finished", err=True)
        raise typer.Exit(DONE)
    count, ranks, chosen = found
    typer.echo(f"{count} {ranks} {','.join(chosen)}")


@job_app.command("end")
def job_end(run: RunArgument, job: Annotated[str, typer.Option()]) -> None:
    """Say by the exit status what follows from how a life ended."""
    from .cluster.lives_of_job import end_life

    code, line = end_life(Path(run), job)
    typer.echo(f"plait: {line}")
    raise typer.Exit(code)


def config_folder(run: Path) -> Path:
    """A run's folder as one would type it here."""
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
