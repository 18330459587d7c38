"""The self-test of one node: a process for each of its devices, and this one, which supervises them.

It imports no torch, waits for nothing beyond the deadline, and has the report written before each phase.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from .device_process import Errand
from .measurements import measure_disk
from .report import DONE, Clock, Device, Disk, Link, Report, write_report
from .versions import versions

__all__ = ["Node", "examine"]

MODULE = "plait.launch.selftest.device_process"

PHASES = (
    ("matmul and memory, first", "ready", "measure"),
    ("matmul and memory", "measured", "meet"),
    ("meeting", "linked", "leave"),
    ("end", "done", ""),
)
"""What the node is in; what its devices tell when they are through with it; what they are told then."""

DISK_SECONDS = 15.0
"""A disk that takes longer for a small file is taken for one that does not answer."""

SPARE = 2.0
"""Seconds before the deadline at which the devices' processes should have given up by themselves."""


@dataclass(frozen=True)
class Node:
    """What to test.

    Attributes:
        place: from 0; `of` nodes take part, and those beyond the first meet at `meet`, HOST:PORT.
        ranks: of the run on this node; 0 is one a GPU, or one where there is none.
        run: the run's folder.
        device: auto, cpu or cuda.
        patience: seconds.
    """

    name: str
    run: Path
    place: int = 0
    of: int = 1
    meet: str = ""
    ranks: int = 0
    device: str = "auto"
    patience: float = 60.0


class _Process:
    """A device's process, and what it has told."""

    def __init__(self, errand: Errand, told: "queue.SimpleQueue[tuple[int, dict[str, Any] | None]]") -> None:
        self.index, self.over, self.failure = errand.index, False, ""
        self.links: list[Link] = []
        # It outlives this method: what a process says last is read when it is dead.
        self._err = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = _start(json.dumps(asdict(errand)), self._err)
        self._told = told
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except OSError:
            pass

    def end(self) -> None:
        self._process.kill()
        self._err.close()

    def last_words(self) -> str:
        """Why it died."""
        status = self._process.wait(timeout=5)
        if status < 0:
            return f"killed by signal {-status}"
        self._err.seek(0)
        lines = self._err.read().strip().splitlines()
        return lines[-1][:200] if lines else f"exit status {status}"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._told.put((self.index, json.loads(line)))
        self._told.put((self.index, None))


def examine(node: Node, folder: Path) -> Report:
    """Test this node; its report lies in `folder` from the start on.

    Raises:
        UserError: the folder cannot be written to.
    """
    deadline = time.monotonic() + node.patience
    report = Report(node.name, node.place, node.of, os.uname().nodename, versions=versions())

    def enter(phase: str) -> None:
        report.phase = phase
        write_report(folder, report)

    enter("disk")
    report.disk = _within(DISK_SECONDS, lambda: measure_disk(node.run, node.name), Disk(failed="no answer"))
    enter("devices")
    try:
        device, count = _devices(node, report, deadline)
    except _Trouble as trouble:
        report.failed = str(trouble)
        write_report(folder, report)
        return report
    report.devices = [Device(f"{device}:{index}") for index in range(count)]
    _test_devices(node, device, report, deadline, enter)
    enter(DONE)
    return report


class _Trouble(Exception):
    """No device can be tested."""


def _devices(node: Node, report: Report, deadline: float) -> tuple[str, int]:
    """Which kind of device, and how many of them."""
    if node.device == "cpu":
        return "cpu", node.ranks or 1
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err:
        process = _start("gpus", err)
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            raise _Trouble("no answer when the GPUs were counted") from None
        if process.returncode:
            err.seek(0)
            raise _Trouble((err.read().strip().splitlines() or ["the GPUs could not be counted"])[-1])
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    report.versions |= found["versions"]
    gpus = found["devices"]
    if not gpus and node.device == "auto":
        return "cpu", node.ranks or 1
    if gpus < max(1, node.ranks):
        raise _Trouble(f"{gpus} GPUs for {node.ranks or 'any'} ranks")
    return "cuda", node.ranks or gpus


def _test_devices(
    node: Node, device: str, report: Report, deadline: float, enter: Callable[[str], None]
) -> None:
    """Take all devices through the test together, and write down what they tell."""
    told: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
    count = len(report.devices)
    seconds = deadline - SPARE - time.monotonic()
    processes = [
        _Process(Errand(device, index, count, node.name, node.place, node.of, node.meet, seconds), told)
        for index in range(count)
    ]

    def advance(phase: str) -> bool:
        """Hear all until each has come to a phase, or to its end; False where the patience is at its end."""
        while not all(p.over or report.devices[p.index].phase == phase for p in processes):
            try:
                index, facts = told.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                for process in processes:
                    if not process.over and report.devices[process.index].phase != phase:
                        _fail(process, report, f"no answer after {node.patience:g} s")
                return False
            if facts is None:
                if not processes[index].over:
                    _fail(processes[index], report, processes[index].last_words())
            else:
                _note(facts, processes[index], report)
        return True

    def tell(word: str) -> None:
        for process in processes:
            if not process.over:
                process.send(word)

    try:
        for phase, reached, word in PHASES:
            enter(phase)
            if not advance(reached):
                break
            tell(word)
    finally:
        report.links = _sums([process.links for process in processes])
        for process in processes:
            process.end()


def _note(facts: dict[str, Any], process: _Process, report: Report) -> None:
    """What a device's process told, into the report."""
    device = report.devices[process.index]
    for key in ("phase", "model", "matmul", "memory", "share"):
        if key in facts:
            setattr(device, key, facts[key])
    if "link" in facts:
        process.links.append(Link(**facts["link"]))
    if "end" in facts:
        process.over = True
    if process.index == 0:
        # The first process speaks for the node.
        for key in ("session", "names", "meeting_failed"):
            if key in facts:
                setattr(report, key, facts[key])
        if "clock" in facts:
            report.clock = Clock(**facts["clock"])


def _fail(process: _Process, report: Report, why: str) -> None:
    device = report.devices[process.index]
    device.failed = f"{why} (in: {device.phase})"
    process.over = True


def _sums(links: list[list[Link]]) -> list[Link]:
    """A node's links from those of its devices, which ran at once; one that failed fails the whole."""
    whole: dict[str, Link] = {}
    for one in (link for of_device in links for link in of_device):
        so_far = whole.setdefault(one.to, Link(one.to, 0.0))
        so_far.failed = so_far.failed or one.failed
        if so_far.bandwidth is not None:
            so_far.bandwidth = None if one.bandwidth is None else so_far.bandwidth + one.bandwidth
    return list(whole.values())


def _start(task: str, err: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, task],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=err,
        text=True,
    )


def _within(seconds: float, deed: Callable[[], Disk], otherwise: Disk) -> Disk:
    """What a deed returns, if it does in time: a disk whose server is gone holds whoever touches it."""
    found: list[Disk] = []
    thread = threading.Thread(target=lambda: found.append(deed()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else otherwise
