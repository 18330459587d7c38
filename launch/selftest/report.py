"""What a node's self-test found, and the file it lies in; without torch.

The file is replaced whole each time the test comes further, so that it says how far a node came that died.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError

__all__ = ["DONE", "Clock", "Device", "Disk", "Link", "Report", "read_reports", "report_file", "write_report"]

DONE = "done"


@dataclass
class Device:
    """A rank's share of a node: a GPU, or some of the processor's cores."""

    name: str
    """Such as cuda:3; cpu:1 is the second rank's share."""
    model: str = ""
    phase: str = "start"
    """What it was doing last."""
    matmul: float | None = None
    """TFLOP/s: of bf16 on a GPU, of fp32 on a processor."""
    memory: float | None = None
    """GB/s, read and written."""
    share: float | None = None
    """Of a processor's device: how much of its threads' time it ran, other processes and stops aside."""
    failed: str | None = None


@dataclass
class Disk:
    """The run's folder as this node sees it."""

    free: int | None = None
    """Bytes."""
    write_seconds: float | None = None
    """To write 1 MiB and have it on the disk."""
    failed: str | None = None


@dataclass
class Clock:
    """This node's clock against that of place 0."""

    ahead: float | None = None
    """Seconds; negative where it is behind."""
    uncertainty: float | None = None
    """Seconds, to either side."""


@dataclass
class Link:
    """The all-reduce between this node and one neighbour, all their devices at once."""

    to: str
    bandwidth: float | None = None
    """GB/s of the tensor that is summed; over two nodes as many leave each."""
    failed: str | None = None


@dataclass
class Report:
    node: str
    place: int
    of: int
    host: str
    phase: str = "start"
    """What it was doing last; `done` at the end, whatever was found."""
    session: str | None = None
    """Which meeting it took part in; None where it met nobody."""
    names: list[str | None] = field(default_factory=list)
    """The nodes at that meeting, by place; None for one that did not come."""
    meeting_failed: str | None = None
    devices: list[Device] = field(default_factory=list)
    disk: Disk = field(default_factory=Disk)
    clock: Clock = field(default_factory=Clock)
    links: list[Link] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    failed: str | None = None
    """Why it went no further, where that is of no one device."""


def report_file(folder: Path, node: str) -> Path:
    """
    Raises:
        UserError: the name of the node is no name of a file.
    """
    if not node or "/" in node or node.startswith("."):
        raise UserError(f"--node = {node!r} is no name of a node; give a host's name")
    return folder / f"{node}.json"


def write_report(folder: Path, report: Report) -> None:
    """Replace the node's file.

    Raises:
        UserError: the folder cannot be written to.
    """
    file = report_file(folder, report.node)
    written = file.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(report)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(written, file)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name a folder that every node can write to") from None


def read_reports(folder: Path, nodes: Iterable[str]) -> dict[str, Report | str]:
    """The nodes' reports; of one without a report, why there is none."""
    return {node: _read(report_file(folder, node)) for node in nodes}


def _read(file: Path) -> Report | str:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return _report(tree)
    except FileNotFoundError:
        return "missing: it left no report"
    except OSError as error:
        return f"missing: its report cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "broken: its report is none"


def _report(tree: dict[str, Any]) -> Report:
    return Report(
        **tree
        | {
            "devices": [Device(**one) for one in tree["devices"]],
            "disk": Disk(**tree["disk"]),
            "clock": Clock(**tree["clock"]),
            "links": [Link(**one) for one in tree["links"]],
        }
    )
