"""Ranks on this machine, really started: how they end, and what is said of it."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

PROGRAM = Path(__file__).with_name("rank_program.py")

PATIENCE = 120
"""Seconds after which a test gives up; every launch below takes a few on an idle machine."""


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


def start(deed: str, folder: Path, ranks: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), "launch", deed, str(ranks), str(folder), str(restarts)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def launch(deed: str, folder: Path, restarts: int = 0) -> tuple[int, str, str]:
    """Exit status, standard output and error of a launch of two ranks."""
    process = start(deed, folder, restarts=restarts)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def start_waiting(folder: Path) -> subprocess.Popen[str]:
    """A launch whose ranks wait for good, when they do."""
    process = start("wait", folder)
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "it ended before its ranks waited"
    return process


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def test_two_ranks_share_the_cores_and_rank_0_has_the_terminal(tmp_path):
    status, out, err = launch("succeed", tmp_path)
    threads = max(1, cores() // 2)
    assert (status, err) == (0, "")
    assert out == f"rank 0 with {threads} threads\nfinished\n"
    assert (tmp_path / "rank-00001.out").read_text() == f"rank 1 with {threads} threads\n"
    assert not (tmp_path / "rank-00000.out").exists()


def test_a_rank_that_fails_is_named_and_not_its_echo(tmp_path):
    status, _, err = launch("fail", tmp_path)
    log = tmp_path / "rank-00001.log"
    assert status == 1
    assert err == f"plait: error: rank 1: ValueError: the data is odd; its traceback is in {log}\n"
    assert "in fail\n    raise ValueError" in log.read_text()


def test_a_mistake_that_all_ranks_meet_is_told_once(tmp_path):
    status, _, err = launch("mistake", tmp_path, restarts=3)
    assert (status, err) == (2, "plait: error: data.blend = x: no such file; name another\n")


def test_a_rank_that_is_killed_is_named(tmp_path):
    status, _, err = launch("die", tmp_path)
    assert status == 1
    assert err.startswith("plait: error: rank 1 was killed by signal 9 (SIGKILL)")
    assert err.count("\n") == 1


@pytest.mark.long
def test_after_a_death_all_ranks_are_started_again(tmp_path):
    status, out, err = launch("die_once", tmp_path, restarts=3)
    assert status == 0
    assert err == (
        "plait: rank 1 was killed by signal 9 (SIGKILL); a machine out of memory does that; "
        "going on from the start (restart 1 of 3)\n"
    )
    assert out.count("rank 0 with") == 2
    assert out.endswith("finished\n")


def test_a_hang_ends_with_the_stacks_of_all_ranks(tmp_path):
    folders = [tmp_path / deed for deed in ("hang", "deaf")]
    for folder in folders:
        folder.mkdir()
    # Side by side: both spend most of their time waiting.
    hung, deaf = start("hang", folders[0]), start("deaf", folders[1], ranks=3)
    *stacks, line = hung.communicate(timeout=PATIENCE)[1].splitlines()
    assert hung.returncode == 1
    place = r"\(tests/launch/rank_program.py:\d+\) since step 2"
    rank_0, rank_1 = rf"rank 0 in add_up {place}", rf"rank 1 in sleep_forever {place}"
    assert re.fullmatch(rf"plait: error: no progress for 3 s: {rank_0}; {rank_1}", line)
    assert [text for text in stacks if text.startswith("rank ")] == ["rank 0:", "rank 1:"]
    assert any("work.wait()" in text for text in stacks)
    assert any("time.sleep(60)" in text for text in stacks)
    assert "in sleep_forever\n" in (folders[0] / "rank-00001.log").read_text()

    line = deaf.communicate(timeout=PATIENCE)[1].splitlines()[-1]
    ended = time.time()
    assert deaf.returncode == 1
    assert "no progress for 3 s: rank 0 in add_up" in line
    assert "ranks 1, 2 without an answer" in line
    assert "in deaf\n" in (folders[1] / "rank-00001.log").read_text()
    # Where a stopped rank is not woken to be ended, torch's launcher waits half a minute for it.
    assert ended - (folders[1] / "rank-00000.log").stat().st_mtime < 25


@pytest.mark.long
def test_a_step_has_a_shorter_limit_than_what_lies_between_steps(tmp_path):
    folders = [tmp_path / deed for deed in ("stall", "late")]
    for folder in folders:
        folder.mkdir()
    stalled, late = start("stall", folders[0]), start("late", folders[1])
    *stacks, line = stalled.communicate(timeout=PATIENCE)[1].splitlines()
    assert stalled.returncode == 1
    place = r"\(tests/launch/rank_program.py:\d+\) since step 2"
    limit = "3 s, 20 times the median step of 0.15 s"
    rank_0, rank_1 = rf"rank 0 in sleep_forever {place}", rf"rank 1 in add_up {place}"
    assert re.fullmatch(rf"plait: error: no progress for {limit}: {rank_0}; {rank_1}", line)
    assert any("time.sleep(60)" in text for text in stacks)
    # The other ranks wait in their step for twice its limit, for one that is not in its.
    out, err = late.communicate(timeout=PATIENCE)
    assert (late.returncode, err) == (0, "")
    assert out.endswith("finished\n")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_all_ranks_at_once(tmp_path, number):
    """These ranks would never get to the end of a step."""
    process = start_waiting(tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"plait: ended by {number.name}; the same command goes on"
    assert ("Ctrl-C again ends at once" in err) == (number == signal.SIGINT)
    # An idle machine takes half a second.
    assert time.monotonic() - began < 10


def test_ranks_do_not_outlive_their_launcher(tmp_path):
    process = start_waiting(tmp_path)
    process.kill()
    # Both ranks hold the pipes: this returns when they are gone.
    process.communicate(timeout=PATIENCE)
    for rank in range(2):
        log = (tmp_path / f"rank-{rank:05d}.log").read_text()
        assert "the launcher of this rank is gone" in log


@pytest.fixture
def local(plait, monkeypatch, tiny, tmp_path):
    """Run `plait launch local` on the tiny config with a launcher that only notes what it is to do."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    launched = []

    def launch_ranks(command: list[str], ranks: int, log_folder: Path, *restarting: object) -> int:
        launched.append((yaml.safe_load(Path(command[-1]).read_text()), ranks, log_folder, *restarting))
        return 0

    def run(*overrides: str):
        monkeypatch.setattr("plait.launch.local.launch_ranks", launch_ranks)
        code, _, err = plait("launch", "local", file, *overrides)
        return code, err, launched

    return run


def test_the_layout_says_how_many_ranks_and_they_get_the_resolved_config(local, tmp_path):
    status, err, launched = local("train.steps=7", "parallel.dp_replicate=2", "parallel.dp_shard=2")
    ((config, ranks, folder, checkpoints, restarts),) = launched
    assert (status, err, ranks, folder) == (0, "", 4, tmp_path / "run" / "logs")
    assert (checkpoints, restarts) == (tmp_path / "run" / "checkpoints", 3)
    assert config["train"]["steps"] == 7
    assert config["optim"]["clip"] > 0
    assert math.prod(config["parallel"][axis] for axis in ("dp_replicate", "dp_shard", "sp", "tp")) == 4


def test_fewer_ranks_than_the_layout_has_take_the_first_that_fits(local):
    layouts = "launch.fallback_layouts=[{sp: 2}, {}]"
    status, err, launched = local("parallel.dp_shard=2", "parallel.sp=2", layouts, "--gpus-per-node", "3")
    ((config, ranks, *_),) = launched
    # The ranks find their layout by their number.
    assert (status, err, ranks, config["parallel"]["dp_shard"]) == (0, "", 2, 2)
    status, err, launched = local(
        "parallel.sp=4", "launch.fallback_layouts=[{tp: 2}]", "--gpus-per-node", "1"
    )
    assert (status, len(launched)) == (2, 1)
    assert err.startswith("plait: error: 1 node of 1 does not hold the 4 ranks of parallel (sp 4)")


MISTAKES = {
    "a misspelt key": ("parallel.dp=2", "parallel.dp=2: parallel.dp is not a key"),
    "a GPU that is not there": ("train.device=cuda", "train.device = cuda but torch sees no GPU here"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_config_starts_no_rank(mistake, local, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    override, line = MISTAKES[mistake]
    status, err, launched = local(override)
    assert (status, launched) == (2, [])
    assert err.startswith(f"plait: error: {line}")
    assert err.count("\n") == 1
