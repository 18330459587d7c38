"""The self-test, really run: on this machine, and on several nodes that are all on it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from plait.launch.selftest import measurements
from plait.launch.selftest.meeting import Meeting, rounds
from plait.launch.selftest.node import Node, examine
from plait.launch.selftest.report import DONE, Clock, Device, Disk, Link, Report, read_reports, write_report
from plait.launch.selftest.verdict import judge
from plait.launch.selftest.versions import versions
from plait.pretrain.run_log import RUN_LOG

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

PATIENCE = 200

# Half of the time stopped, in turns that are shorter than a burst.
HALVED = """
import os, signal, subprocess, sys, time
process = subprocess.Popen(sys.argv[1:], start_new_session=True)
while process.poll() is None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.killpg(process.pid, number)
        time.sleep(0.04)
"""

MEETING = """
import dataclasses, json, os, sys, time, torch
from plait.launch.selftest.meeting import Meeting
place, endpoint, late = int(sys.argv[1]), sys.argv[2], ""
meeting = Meeting(place, 4, f"n{place}", 0, endpoint, time.monotonic() + 15)
meeting.assemble()
if place == 3:
    try:
        Meeting(2, 4, "n2", 0, endpoint, time.monotonic() + 20).assemble()
    except RuntimeError as error:
        late = str(error)
found = meeting.clock(), list(meeting.links(torch.device("cpu")))
meeting.leave()
print(json.dumps([meeting.session, meeting.names, *map(dataclasses.asdict, found[:1]), [
    link.to for link in found[1] if link.bandwidth and link.failed is None], late]), flush=True)
os._exit(0)
"""


def free_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*words: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-m", "plait.launch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def run(*words: object) -> tuple[int, str]:
    process = start(*words)
    out, err = process.communicate(timeout=PATIENCE)
    assert err == ""
    return process.returncode, out


@pytest.mark.long
def test_a_node_at_half_speed_is_found_and_left_out(tmp_path):
    """On a machine that is busy otherwise the whole node may have lost as much, when the halved one had not:
    so it may try again."""
    status, out, verdict = 0, "", {"bad": {}, "good": []}
    for _ in range(3):
        words = ["--of", 2, "--meet", free_endpoint(), "--run", tmp_path, "--device", "cpu", "--ranks", 1]
        words += ["--patience", 120]
        processes = [
            start("selftest", tmp_path, "--node", "whole", "--place", 0, *words),
            start(
                *("selftest", tmp_path, "--node", "halved", "--place", 1, *words),
                before=(sys.executable, "-c", HALVED),
            ),
        ]
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            assert ": tested; " in out
        status, out = run(
            "judge", tmp_path, "--nodes", "whole,halved", "--run", tmp_path, "--names", "--free", 1
        )
        verdict = json.loads((tmp_path / "verdict.json").read_text())
        if list(verdict["bad"]) == ["halved"]:
            break
    assert (status, list(verdict["bad"]), verdict["good"]) == (3, ["halved"], ["whole"])
    assert out.splitlines()[-1] == "whole"
    assert any("\nhalved: slow: " in "\n" + line for line in out.splitlines())
    log = (tmp_path / RUN_LOG).read_text().splitlines()[-1]
    assert "self-test: halved: slow: " in log
    assert log.endswith("; good: whole")
    reports = [json.loads((tmp_path / f"{node}.json").read_text()) for node in ("whole", "halved")]
    for report, other in zip(reports, ("halved", "whole"), strict=True):
        assert (report["phase"], report["names"]) == (DONE, ["whole", "halved"])
        assert report["session"] == reports[0]["session"]
        assert report["links"][0]["to"] == other
        assert report["links"][0]["bandwidth"] > 0
        # One clock, read by two: apart by no more than what the reading is sure of.
        assert abs(report["clock"]["ahead"]) <= report["clock"]["uncertainty"] + 1e-3
    assert reports[0]["versions"] == reports[1]["versions"]


@pytest.mark.long
def test_who_is_not_there_is_not_waited_for_and_neighbours_meet_in_turns():
    endpoint = free_endpoint()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, str(place), endpoint],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for place in (0, 1, 3)
    ]
    found = [json.loads(process.communicate(timeout=PATIENCE)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    sessions, names, clocks, neighbours, late = zip(*found, strict=True)
    assert len(set(sessions)) == 1
    assert names == (["n0", "n1", None, "n3"],) * 3
    assert neighbours == (["n1", "n3"], ["n0"], ["n0"])
    assert late == ("", "", "it came when the others had begun")
    assert clocks[0] == {"ahead": 0.0, "uncertainty": 0.0}
    assert all(clock["uncertainty"] > 0 for clock in clocks[1:])


def test_a_host_that_is_not_there_is_not_waited_for_without_end():
    with pytest.raises(RuntimeError):
        Meeting(1, 2, "n1", 0, free_endpoint(), time.monotonic() + 1)


@pytest.mark.long
def test_two_machines_of_two_ranks_and_place_0_tells_the_verdict(tmp_path):
    (tmp_path / "config.yaml").touch()
    words = ["--device", "cpu", "--ranks", 2, "--slow", 0, "--free", 1, "--patience", 120, "--of", 2]
    words += ["--meet", free_endpoint()]
    host = start("launch", "doctor", tmp_path, *words, "--node", "n0", "--json")
    guest = start("launch", "doctor", tmp_path, *words, "--node", "n1", "--place", 1)
    (host_out, _), (guest_out, _) = (process.communicate(timeout=PATIENCE) for process in (host, guest))
    assert (host.returncode, guest.returncode) == (0, 0)
    assert [line.split()[0] for line in guest_out.splitlines()] == ["node", "n1", "this"]
    assert guest_out.endswith("place 0 prints the verdict on all\n")
    found = json.loads(host_out)
    assert (found["verdict"]["bad"], found["verdict"]["good"]) == ({}, ["n0", "n1"])
    for report in found["reports"].values():
        assert [device["name"] for device in report["devices"]] == ["cpu:0", "cpu:1"]
        assert all(0 < device["share"] < 1.1 for device in report["devices"])
        assert all(device["matmul"] > 0 and device["memory"] > 0 for device in report["devices"])
        (link,) = report["links"]
        assert link["bandwidth"] > 0
    assert (tmp_path / RUN_LOG).read_text().endswith("self-test: n0, n1 are good\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", RUN_LOG, "self-test"]
    # The next time n1 does not come, and only its old report is there.
    report = read_reports(tmp_path / "self-test", ["n1"])["n1"]
    fresh = Report("n0", 0, 2, "host", DONE, session="another", names=["n0", None])
    assert judge({"n0": fresh, "n1": report}).bad == {"n1": ["missing: its report is of another self-test"]}


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def phase_of(file: Path) -> str:
    return json.loads(file.read_text())["phase"] if file.exists() else ""


@pytest.mark.long
def test_devices_that_die_or_hang_and_a_node_that_dies(tmp_path):
    words = ["--run", tmp_path, "--device", "cpu", "--ranks", 2]
    hung = start("selftest", tmp_path, "--node", "hung", *words, "--patience", 12)
    dead = start("selftest", tmp_path, "--node", "dead", *words)
    bursts = "matmul and memory, first"
    wait_for(lambda: phase_of(tmp_path / "hung.json") == bursts)
    devices = sorted(psutil.Process(hung.pid).children(), key=lambda process: process.pid)
    wait_for(lambda: len(devices) == 2 or bool(devices.extend(psutil.Process(hung.pid).children())))
    devices[0].send_signal(signal.SIGSTOP)
    devices[1].kill()
    wait_for(lambda: phase_of(tmp_path / "dead.json") == bursts)
    orphans = psutil.Process(dead.pid).children()
    dead.kill()
    dead.communicate()
    assert hung.communicate(timeout=PATIENCE)[0] == f"hung: tested; {tmp_path / 'hung.json'}\n"
    wait_for(lambda: not any(process.is_running() for process in orphans))
    assert not devices[0].is_running()
    status, out = run("judge", tmp_path, "--nodes", "hung,dead", "--run", tmp_path, "--names")
    assert status == 3
    assert "\nhung: broken: cpu:0: no answer after 12 s (in: " in out
    assert "\nhung: broken: cpu:1: killed by signal 9 (in: " in out
    assert f"\ndead: broken: it died or hung (in: {bursts})\n" in out
    # Nobody is left, and the line that names the good ones is there all the same.
    assert out.endswith("\n\n")


def test_fewer_gpus_than_ranks_are_told(tmp_path):
    node = Node("n0", tmp_path, ranks=10_000, device="cuda")
    report = examine(node, tmp_path / "reports")
    assert report.failed is not None
    assert report.failed.endswith("GPUs for 10000 ranks")
    assert json.loads((tmp_path / "reports" / "n0.json").read_text())["phase"] == "devices"


MISTAKES = {
    "no such folder": (["launch", "doctor", "nowhere"], "nowhere: no such folder"),
    "no such device": (["launch", "doctor", ".", "--device", "tpu"], "--device = tpu is none"),
    "no place": (["launch", "doctor", ".", "--place", "2"], "--place = 2 is not among --of = 1 nodes"),
    "nowhere to meet": (["launch", "doctor", ".", "--of", "2"], "--meet = '' is no HOST:PORT"),
    "no size": (["launch", "doctor", ".", "--free", "5GiB"], "--free = 5GiB is no size"),
    "no time": (["judge", ".", "--nodes", "a", "--run", ".", "--max-skew", "soon"], "--max-skew = soon"),
    "no nodes": (["judge", ".", "--nodes", ",", "--run", "."], "--nodes names no node"),
    "no name": (["selftest", ".", "--node", "a/b", "--run", "."], "--node = 'a/b' is no name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, plait, monkeypatch, tmp_path):
    words, line = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    code, _, err = plait(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"plait: error: {line}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def commanded(plait, monkeypatch, tmp_path):
    """The node that a command line would test."""
    asked = []

    def note(node: Node, folder: Path) -> Report:
        asked.append(node)
        report = Report(node.name, node.place, node.of, "host", DONE)
        write_report(folder, report)
        return report

    def command(*words: str) -> Node:
        monkeypatch.setattr("plait.launch.selftest.node.examine", note)
        assert plait(*words)[0] == 0
        return asked[-1]

    return command


def test_slurm_says_who_a_node_is_unless_the_command_does(commanded, monkeypatch, tmp_path):
    here = str(tmp_path)
    for key in ("SLURMD_NODENAME", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(key, raising=False)
    assert commanded("selftest", here, "--run", here) == Node(socket.gethostname(), tmp_path)
    for key, value in {"SLURMD_NODENAME": "n7", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(key, value)
    slurm = commanded("selftest", here, "--run", here, "--meet", "n0:29000", "--ranks", "8")
    assert slurm == Node("n7", tmp_path, 3, 4, "n0:29000", 8)
    words = [
        "--node",
        "a",
        "--place",
        "1",
        "--of",
        "2",
        "--meet",
        "b:1",
        "--device",
        "cpu",
        "--patience",
        "9",
    ]
    assert commanded("selftest", here, "--run", here, *words) == Node("a", tmp_path, 1, 2, "b:1", 0, "cpu", 9)
    # What runs in a job of many tasks may test its one machine.
    assert commanded("launch", "doctor", here, "--node", "a") == Node("a", tmp_path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_machine_tells_what_it_knows_of_itself(place, plait, monkeypatch, tmp_path):
    def note(node: Node, folder: Path) -> Report:
        return Report(node.name, node.place, node.of, "host", DONE, meeting_failed="timed out")

    monkeypatch.setattr("plait.launch.selftest.node.examine", note)
    words = ["--place", "1", "--of", "2", "--meet", "n0:1"] if place else []
    code, out, _ = plait("launch", "doctor", tmp_path, "--node", "a", *words)
    lines = out.splitlines()
    assert lines[1].split() == ["a", "bad" if place else "good"]
    assert code == (3 if place else 0)
    told = ["a: unreachable: timed out", "this is what the machine says of itself; "]
    assert [line[: len(start)] for line, start in zip(lines[2:], told, strict=bool(place))] == told[
        : 2 * place
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_verdict_on_reports(plait, tmp_path):
    """Every option of the judge reaches its rule, and the table shows what was found."""
    for place, rate in ((0, 700.0), (1, 560.0)):
        link = Link(f"n{1 - place}", 20.5)
        report = Report(f"n{place}", place, 2, "host", DONE, session="one", names=["n0", "n1"])
        report.devices = [
            Device("cuda:0", "H100", "done", rate, 2800.0),
            Device("cuda:1", "H100", "done", 710),
        ]
        report.disk, report.clock, report.links = Disk(2 * 10**9, 0.0021), Clock(7.0 * place, 0.0003), [link]
        write_report(tmp_path, report)

    def judged(*words: str) -> tuple[int, str]:
        return plait("judge", tmp_path, "--nodes", "n0,n1", "--run", tmp_path, *words)[:2]

    status, out = judged("--max-skew", "10s")
    header, n0, n1 = out.splitlines()
    assert status == 0
    assert header.split("  ")[0] == "node"
    assert " ".join(n0.split()) == "n0 2 x H100 700 2.8e+03 n1 20.5 2.00 GB 2.1 ms +0.0 ± 0.3 ms good"
    assert " ".join(n1.split()) == "n1 2 x H100 560 2.8e+03 n0 20.5 2.00 GB 2.1 ms +7000.0 ± 0.3 ms good"
    status, out = judged()
    assert (status, out.splitlines()[-1]) == (3, "n1: clock: 7.0 s ahead of the others, more than 5 s")
    status, out = judged("--max-skew", "10s", "--slow", "0.9")
    assert (status, "\nn1: slow: matmul of cuda:0" in out) == (3, True)
    status, out = judged("--max-skew", "10s", "--free", "3GB", "--names")
    assert (status, out.count("disk: 2.00 GB free in the run's folder, less than 3.00 GB")) == (3, 2)
    assert (tmp_path / RUN_LOG).read_text().count("\n") == 4


@pytest.mark.parametrize("nodes", range(1, 9))
def test_rounds_pair_all_neighbours_and_none_twice(nodes):
    found = rounds(nodes)
    pairs = {frozenset((place, (place + 1) % nodes)) for place in range(nodes)} if nodes > 1 else set()
    assert sorted(map(sorted, pairs)) == sorted(sorted(pair) for pairs in found for pair in pairs)
    for pairs in found:
        places = [place for pair in pairs for place in pair]
        assert len(places) == len(set(places))
    assert len(found) == (0 if nodes == 1 else 1 if nodes == 2 else 2 + nodes % 2)


def test_a_burst_counts_what_was_done_until_its_end(monkeypatch):
    now, busy = [0.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: busy[0])

    def deed() -> None:
        now[0] += 0.125
        busy[0] += 0.125

    settled = []
    burst = next(measurements.bursts(deed, work=10.0, settle=lambda: settled.append(1), threads=2))
    assert (burst.rate, burst.share, len(settled)) == (80.0, 0.5, 3)


def test_a_disk_that_refuses_keeps_nothing(monkeypatch, tmp_path):
    assert measurements.measure_disk(tmp_path / "nowhere", "n0") == Disk(failed="No such file or directory")
    whole = measurements.measure_disk(tmp_path, "n0")
    assert whole.failed is None
    assert whole.free is not None
    assert whole.write_seconds is not None
    assert whole.write_seconds > 0

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    full = measurements.measure_disk(tmp_path, "n0")
    assert (full.failed, full.write_seconds) == ("No space left on device", None)
    assert list(tmp_path.iterdir()) == []


def test_versions_are_those_of_what_would_run():
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found == versions()
    assert set(found) == {"plait", "python", "torch", "triton", "driver", "kernel"}
