"""`plait launch doctor`, and two commands for a batch script: `selftest` on each node, then `judge`."""

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .selftest.report import Report
    from .selftest.verdict import Limits, Verdict

__all__ = ["BAD", "doctor", "judge", "selftest"]

BAD = 3
"""Exit status where a node is unfit."""

REPORTS = "self-test"
"""The folder for reports of several hosts, in the one that is tested."""

POLL_SECONDS = 0.2

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Node = Annotated[
    str | None, typer.Option(help="This node's name; by default SLURMD_NODENAME, or the host's.")
]
Place = Annotated[
    int | None, typer.Option(min=0, help="This node's place, from 0; by default SLURM_PROCID, or 0.")
]
Of = Annotated[int | None, typer.Option(min=1, help="How many nodes; by default SLURM_NTASKS, or 1.")]
Meet = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the node at place 0 awaits the others.")]
Ranks = Annotated[
    int, typer.Option(min=0, help="Ranks on a node; 0 is one a GPU, or one where there is none.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="What to test.")]
Patience = Annotated[float, typer.Option(min=1.0, help="Seconds that the test may take.")]
Slow = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Slow is below this share of the better half's median.")
]
MaxSkew = Annotated[str, typer.Option(help="How far a clock may be off, such as 5s.")]
Free = Annotated[str, typer.Option(help="Least room in the run's folder: bytes, or as in 50GB.")]


def selftest(
    folder: Annotated[Path, typer.Argument(help="Where the nodes' reports go.")],
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    node: Node = None,
    place: Place = None,
    of: Of = None,
    meet: Meet = "",
    ranks: Ranks = 0,
    device: DeviceOption = "auto",
    patience: Patience = 60.0,
) -> None:
    """Test this node, and leave its report in FOLDER for `judge`. The status is 0 whatever was found."""
    from .selftest.report import report_file

    report = _test(folder, run, node, place, of, meet, ranks, device, patience)
    typer.echo(f"{report.node}: tested; {report_file(folder, report.node)}")


def judge(
    folder: Annotated[Path, typer.Argument(help="Where the nodes' reports are.")],
    nodes: Annotated[str, typer.Option(metavar="NODE,...", help="The nodes that were to be tested.")],
    run: Annotated[Path, typer.Option(help="The run's folder, whose run.log gets the verdict.")],
    slow: Slow = 0.75,
    max_skew: MaxSkew = "5s",
    free: Free = "1GB",
    names: Annotated[
        bool, typer.Option("--names", help="Print the good nodes, comma-separated, as the last line.")
    ] = False,
) -> None:
    """Judge the nodes by their reports; the status is 3 where one is bad."""
    from ..pretrain.run_log import note
    from .selftest.report import read_reports
    from .selftest.table import print_reports
    from .selftest.verdict import judge as judge_reports
    from .selftest.verdict import write_verdict

    wanted = [name for name in nodes.split(",") if name]
    if not wanted:
        raise UserError("--nodes names no node; give their names, separated by commas")
    reports = read_reports(folder, wanted)
    verdict = judge_reports(reports, _limits(slow, max_skew, free))
    write_verdict(folder, verdict)
    note(run, verdict.summary)
    print_reports(reports, verdict)
    if names:
        typer.echo(",".join(verdict.good))
    raise typer.Exit(BAD if verdict.bad else 0)


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="[RUN_OR_FOLDER]", help="A run's folder, or any on its disk.")
    ] = Path(),
    node: Node = None,
    place: Annotated[int, typer.Option(min=0, help="This machine's place among several, from 0.")] = 0,
    of: Annotated[int, typer.Option(min=1, help="How many machines.")] = 1,
    meet: Meet = "",
    ranks: Ranks = 0,
    device: DeviceOption = "auto",
    patience: Patience = 60.0,
    slow: Slow = 0.75,
    max_skew: MaxSkew = "5s",
    free: Free = "1GB",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Test so many nodes of a Slurm cluster instead of this machine.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="With --nodes: where they are.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The reports and the verdict as an object.")
    ] = False,
) -> None:
    """Test this machine before a run: its devices, disk and versions. The status is 3 where it is bad.

    With --nodes it is nodes of a Slurm cluster that test themselves, with what the cluster file asks for.
    With several machines, start it on each, with its --place, --of and --meet, and a folder that all see: it
    tests their links and clocks too, and place 0 prints the verdict on all.
    """
    from tempfile import TemporaryDirectory

    from ..pretrain.run_folder import RunFolder
    from ..pretrain.run_log import note
    from .selftest.report import read_reports
    from .selftest.verdict import judge as judge_reports

    limits = _limits(slow, max_skew, free)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's, or one on the disk that it will be on")
    if nodes is not None:
        raise typer.Exit(_examine_on_slurm(folder, nodes, partition, ranks, device, limits, as_json))
    reports: Mapping[str, Report | str]
    with TemporaryDirectory(prefix="plait-") as private:
        into = folder / REPORTS if of > 1 else Path(private)
        report = _test(into, folder, node, place, of, meet, ranks, device, patience)
        reports = {report.node: report}
        if of > 1 and place == 0:
            names = [*report.names, *[None] * of][:of]
            names = [name or f"place {number}" for number, name in enumerate(names)]
            names[0] = report.node
            _await_reports(into, report, patience)
            reports = read_reports(into, names)
    verdict = judge_reports(reports, limits, report.session)
    if place > 0 and report.session is None:
        verdict.bad.setdefault(report.node, []).append(f"unreachable: {report.meeting_failed}")
        verdict.good.clear()
    if RunFolder(folder).config_file.is_file() and place == 0:
        note(folder, verdict.summary)
    _show(reports, verdict, as_json)
    if place > 0 and not as_json:
        typer.echo("this is what the machine says of itself; place 0 prints the verdict on all")
    raise typer.Exit(BAD if verdict.bad else 0)


def _examine_on_slurm(
    folder: Path,
    nodes: int,
    partition: str | None,
    ranks: int,
    device: str,
    limits: "Limits",
    as_json: bool,
) -> int:
    """The status that tells of nodes of a cluster."""
    from ..pretrain.run_folder import RunFolder
    from ..pretrain.run_log import note
    from .cluster.examination import examine_nodes
    from .cluster.settings import load_settings
    from .selftest.report import read_reports
    from .selftest.verdict import judge as judge_reports

    settings, _ = load_settings({"nodes": nodes, "partition": partition, "gpus_per_node": ranks or None})
    if settings.gpus_per_node is None:
        settings = settings.model_copy(update={"gpus_per_node": 1})
    into, names = examine_nodes(folder, settings, gpus=device != "cpu")
    reports = read_reports(into, names)
    verdict = judge_reports(reports, limits)
    if RunFolder(folder).config_file.is_file():
        note(folder, verdict.summary)
    _show(reports, verdict, as_json)
    return BAD if verdict.bad else 0


def _show(reports: "Mapping[str, Report | str]", verdict: "Verdict", as_json: bool) -> None:
    from .selftest.table import print_reports

    if as_json:
        found = {name: one if isinstance(one, str) else asdict(one) for name, one in reports.items()}
        typer.echo(json.dumps({"reports": found, "verdict": asdict(verdict)}, indent=1))
    else:
        print_reports(reports, verdict)


def _test(
    folder: Path,
    run: Path,
    name: str | None,
    place: int | None,
    of: int | None,
    meet: str,
    ranks: int,
    device: str,
    patience: float,
) -> "Report":
    from .selftest.node import Node, examine

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device = {device} is none; choose auto, cpu or cuda")
    place = int(os.environ.get("SLURM_PROCID", "0")) if place is None else place
    of = int(os.environ.get("SLURM_NTASKS", "1")) if of is None else of
    if place >= of:
        raise UserError(f"--place = {place} is not among --of = {of} nodes; places count from 0")
    if of > 1 and not (meet.rpartition(":")[0] and meet.rpartition(":")[2].isdecimal()):
        raise UserError(f"--meet = {meet!r} is no HOST:PORT; name the node at place 0 and a free port there")
    name = name or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return examine(Node(name, run, place, of, meet, ranks, device, patience), folder)


def _await_reports(folder: Path, host: "Report", patience: float) -> None:
    """Wait until all who came to the meeting are through; they began about when this one did."""
    from .selftest.report import DONE, Report, read_reports

    came = [name for name in host.names if name]
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = read_reports(folder, came).values()
        if all(isinstance(one, Report) and (one.session, one.phase) == (host.session, DONE) for one in found):
            return
        time.sleep(POLL_SECONDS)


def _limits(slow: float, max_skew: str, free: str) -> "Limits":
    from pydantic import TypeAdapter, ValidationError

    from ..pretrain.config_section import Duration
    from .selftest.verdict import Limits

    try:
        seconds = TypeAdapter(Duration).validate_python(max_skew)
    except ValidationError:
        raise UserError(f"--max-skew = {max_skew} is no time; give seconds, or as in 2m30s") from None
    return Limits(slow, seconds, _bytes(free))


def _bytes(text: str) -> int:
    count = text.rstrip("kMGTB")
    unit = text[len(count) :]
    if not count.strip().isdecimal() or unit not in UNITS:
        raise UserError(f"--free = {text} is no size; give bytes, or as in 500MB or 50GB")
    return int(count) * UNITS[unit]
