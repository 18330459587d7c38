"""The same run under torchrun: it stops when it is asked to, and a killed rank is started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from plait.pretrain.config_file import dump_config, parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.run_folder import RunFolder, read_status

PATIENCE = 120

Node = subprocess.Popen[str]

TRAIN = ("-m", "plait.launch", "train")

HANGING = Path(__file__).with_name("hanging_train.py")


def start(
    *words: object, endpoint: str | None = None, program: tuple[object, ...] = TRAIN, **environment: str
) -> Node:
    """torchrun with two ranks or, given an endpoint, as one of two machines with a rank each."""
    layout = ["--standalone", "--nproc-per-node", "2"]
    if endpoint is not None:
        layout = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
        layout += ["--rdzv-endpoint", endpoint, "--local-addr", "localhost"]
    command = [sys.executable, "-m", "torch.distributed.run", *layout, "--monitor-interval", "0.1"]
    return subprocess.Popen(
        [*command, "--max-restarts", "2", *map(str, (*program, *words))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
    )


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    tiny["parallel"] = {"sp": 2}
    tiny["model"]["pattern"] = "M"
    tiny["train"]["steps"] = 400
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(parse_config(tiny, "test")))
    return file


@pytest.fixture
def folder(tiny) -> RunFolder:
    return RunFolder(tiny["run"]["dir"])


def start_two(*words: object, **options: Any) -> list[Node]:
    """Two machines, of which either may get rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "endpoint": endpoint}
    return [start(*words, **options) for _ in range(2)]


def wait_for_step(folder: RunFolder, more: int, process: Node) -> None:
    def lines() -> int:
        return folder.metrics_file.read_text().count("\n") if folder.metrics_file.exists() else 0

    goal, deadline = lines() + more, time.monotonic() + PATIENCE
    while lines() < goal:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(process: Node) -> list[psutil.Process]:
    """In their order: torchrun starts one after the other."""
    return sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.create_time())


def test_a_killed_rank_is_started_again_and_a_polite_stop_is_no_failure(config, folder):
    process = start(config)
    wait_for_step(folder, 5, process)
    # Steps take milliseconds, and the checkpoint of step 4 is written beside them.
    while not any(folder.checkpoints.glob("step-????????")):
        wait_for_step(folder, 1, process)
    ranks(process)[1].kill()
    wait_for_step(folder, 3, process)
    again = read_metrics(folder.metrics_file)
    assert [record["step"] for record in again] == list(range(1, len(again) + 1))
    # To one rank, as a person or a scheduler may: all of them hear of it.
    ranks(process)[1].send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert "resumed from the checkpoint of step" in out
    assert json.loads(folder.lives_file.read_text())["restarts"] == 1
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("stopped", "a signal to another rank asked for it")
    assert (folder.checkpoints / f"step-{status['step']:08d}").is_dir()


@pytest.mark.long
def test_a_signal_to_torchrun_itself_reaches_the_ranks(config, folder):
    process = start(config)
    wait_for_step(folder, 2, process)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    stopped = read_status(folder)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "SIGTERM asked for it")
    assert (folder.checkpoints / f"step-{stopped['step']:08d}").is_dir()


@pytest.mark.long
def test_lives_that_lead_nowhere_end_with_their_reason(config, folder):
    # Longer than the whole test: no checkpoint ever comes.
    process = start(config, "checkpoint.every=1000", "launch.max_restarts=1")
    for _ in range(2):
        wait_for_step(folder, 1, process)
        ranks(process)[0].kill()
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    line = (
        "plait: error: rank 0: no progress beyond the start after 1 restart(s), which is launch.max_restarts"
    )
    assert line in out


@pytest.mark.long
def test_a_rank_of_either_machine_is_started_again(config, folder):
    machines = start_two(config)
    wait_for_step(folder, 5, machines[0])
    for machine in machines:
        ranks(machine)[0].kill()
        wait_for_step(folder, 5, machines[0])
    folder.stop_file.touch()
    outs = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outs
    again = read_metrics(folder.metrics_file)
    assert [record["step"] for record in again] == list(range(1, len(again) + 1))
    assert sum(out.count("resumed from the checkpoint of step") for out in outs) == 2
    assert read_status(folder)["reason"] == "a file named stop in its folder asked for it"


@pytest.mark.long
def test_a_hang_on_two_machines_is_told_by_the_ranks_themselves(config, folder, tmp_path):
    """In the first life rank 1 sleeps, in the second rank 0 is stopped, and with it the ranks' store."""
    words = ["train.steps=24", "parallel.timeout_least=4", "launch.max_restarts=9"]
    program = (HANGING, tmp_path, "train")
    # torchrun waits so long for a rank that it ends before it kills it.
    machines = start_two(config, *words, program=program, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    outs = [machine.communicate(timeout=3 * PATIENCE)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outs
    assert read_status(folder)["state"] == "finished"
    noted = (folder.path / "run.log").read_text()
    cause = r"no progress for \S+ s.* the median step .* s"
    since = r"since the callbacks of step {}"
    asleep = rf"rank 1 in sleep_forever \(tests/launch/hanging_train\.py:\d+\) {since.format(9)}"
    waiting = rf"rank 0 in .* {since.format(9)}"
    both = rf"{cause}: (?:{asleep}; {waiting}|{waiting}; {asleep})\n"
    assert len(re.findall(rf"plait: error: {both}", "".join(outs))) == 1, outs
    assert len(re.findall(rf"failed: {both}", noted)) == 1, noted
    assert any("time.sleep(60)" in out for out in outs)
    deaf = rf"{cause}: rank 0, which keeps the ranks' store, does not answer\n"
    assert len(re.findall(rf"plait: error: {deaf}", "".join(outs))) == 1, outs
    assert len(re.findall(rf"failed: {deaf}", noted)) == 1, noted
    assert re.search(rf"plait: error: rank 1: {cause}: in .* {since.format(19)}\n", "".join(outs))
