"""How a run stands, from files of any size, whole or not."""

import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.errors import UserError
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.readable import readable_age, readable_time
from plait.pretrain.run_folder import RunFolder, read_status, write_status
from plait.pretrain.run_log import FAILED, note
from plait.pretrain.standing import Standing, find_runs, standing_of


class Made:
    """A run's folder, as a run would leave it."""

    def __init__(self, path: Path, steps: int = 100) -> None:
        self.folder = RunFolder(path)
        path.mkdir()
        (path / "config.yaml").write_text(f"train: {{steps: {steps}, stop_at: null}}\n")

    def metrics(self, steps: range, ago: float = 0, **more: Any) -> None:
        with self.folder.metrics_file.open("a") as file:
            for step in steps:
                speed = {"tokens_per_second": 1000.0 * step, "step_seconds": 2.0}
                file.write(json.dumps({"step": step, "loss": 10 / step, **speed, **more}) + "\n")
        self.age(self.folder.metrics_file, ago)

    def status(self, state: str, step: int, reason: str | None = None, ago: float = 0) -> None:
        write_status(self.folder, state, step, reason)
        told = read_status(self.folder) | {"time": time.time() - ago}
        self.folder.status_file.write_text(json.dumps(told))

    def age(self, file: Path, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(file, times=(then, then))

    def held_by(self, host: str) -> None:
        self.folder.lock_file.write_text(f"12 {host}\n")

    @property
    def now(self) -> Standing:
        return standing_of(self.folder)


@pytest.fixture
def run(tmp_path) -> Made:
    return Made(tmp_path / "run")


def test_a_run_that_runs(run):
    run.status("running", 0, ago=300)
    run.metrics(range(1, 11), validation_loss=3.0)
    run.metrics(range(11, 41), ago=20)
    with run.folder.lock():
        now = run.now
        assert (now.state, now.step, now.steps, now.loss, now.validation_loss) == (
            "running",
            40,
            100,
            0.25,
            3.0,
        )
        assert (now.tokens_per_second, now.seconds_left, now.restarts) == (30500.0, 120.0, 0)
        assert now.quiet == pytest.approx(20, abs=5)
        assert (now.pid, now.host, now.reason) == (os.getpid(), socket.gethostname(), None)


def test_states(run):
    assert run.now.state == "new"
    with run.folder.lock():
        assert run.now.state == "busy"
    run.status("running", 0)
    assert run.now.state == "died"
    note(run.folder.path, "checkpoint saved: step 4")
    assert run.now.reason is None
    note(run.folder.path, f"{FAILED}rank 1 was killed by signal 9 (SIGKILL)")
    assert run.now.reason == "rank 1 was killed by signal 9 (SIGKILL)"
    run.held_by("elsewhere")
    assert (run.now.state, run.now.reason) == (
        "running?",
        "by elsewhere whose hold of the folder cannot be seen here",
    )
    run.status("stopped", 4, "SIGTERM asked for it")
    assert (run.now.state, run.now.step, run.now.reason) == ("stopped", 4, "SIGTERM asked for it")
    assert run.now.seconds_left is None
    run.status("finished", 100)
    assert (run.now.state, run.now.reason, run.now.restarts) == ("finished", None, 0)
    run.status("running", 50)
    run.status("failed", 50, "RuntimeError: no")
    note(run.folder.path, "started: again")
    assert (run.now.state, run.now.reason, run.now.restarts) == ("failed", "RuntimeError: no", 1)


def test_steps_lost_by_a_resume_are_not_shown(run):
    run.metrics(range(1, 51), ago=60, validation_loss=1.0)
    run.status("running", 40)
    assert (run.now.step, run.now.loss) == (40, 0.25)
    run.metrics(range(41, 46))
    run.status("running", 40, ago=5)
    assert (run.now.step, run.now.loss, run.now.validation_loss) == (45, 10 / 45, 1.0)


def test_the_checkpoint_saved_last(run):
    checkpoints = Checkpoints(run.folder.checkpoints)
    # The run went back to an older step, and on from there.
    for step in (2, 4, 3):
        checkpoints.save(step, {"x": torch.zeros(2)}, {})
    assert run.now.checkpoint == 3
    assert run.now.checkpoint_age is not None
    assert 0 <= run.now.checkpoint_age < 60
    for damage in (b"{", b"", b"[]"):
        (run.folder.checkpoints / "step-00000003" / "manifest.json").write_bytes(damage)
        assert run.now.checkpoint == 4


def test_a_huge_file_is_not_read(run):
    run.status("running", 0, ago=60)
    with run.folder.metrics_file.open("wb") as file:
        file.truncate(1 << 36)
    with run.folder.metrics_file.open("ab") as file:
        file.write(b"\n")
    run.metrics(range(10, 20))
    began = time.monotonic()
    assert (run.now.step, run.now.validation_loss) == (19, None)
    assert time.monotonic() - began < 10


def test_files_that_are_cut_or_filled_with_anything(run):
    draw = random.Random(0)
    run.metrics(range(1, 4), validation_loss=float("nan"))
    run.status("failed", 3, "no")
    run.held_by("somewhere")
    note(run.folder.path, f"{FAILED}no")
    whole = {file: file.read_bytes() for file in run.folder.path.iterdir()}
    assert {file.name for file in whole} == {
        "metrics.jsonl",
        "status.json",
        ".lock",
        "run.log",
        "config.yaml",
    }
    anything = [
        b"",
        b"\0" * 99,
        b"\xff" * 9,
        b"[" * 5000,
        b"{}\n",
        b"null\n",
        b'{"step": "x", "time": []}\n',
        b"train: 3\n",
        b"train: {steps: []}\n",
    ]
    anything += [b'{"step": 3, "loss": [1], "tokens_per_second": null, "validation_loss": "x"}\n']
    anything += [
        b'{"state": [], "step": -1, "starts": "many", "reason": 3, "time": 1e999}\n',
        b"9" * 4000 + b" x",
    ]
    for _ in range(150):
        for file, text in whole.items():
            deed = draw.randrange(4)
            if deed == 0:
                file.write_bytes(text[: draw.randrange(len(text) + 1)])
            elif deed == 1:
                file.write_bytes(draw.choice(anything))
            elif deed == 2:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(text)
        assert isinstance(run.now, Standing)
    for file in whole:
        file.unlink(missing_ok=True)
        file.mkdir()
    assert run.now.state == "new"


def test_whoever_looks_is_not_in_the_way(run):
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            run.folder.holder()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(100):
            run.folder.lock().close()
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    with run.folder.lock(), pytest.raises(UserError, match="another process is training here"):
        run.folder.lock()


def test_runs_are_found_in_a_folder(tmp_path):
    for name in ("b", "a"):
        Made(tmp_path / name)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    found = find_runs([str(tmp_path), str(tmp_path / "b")])
    assert [run.path.name for run in found] == ["a", "b"]
    for path, what in (("none", "no such folder"), ("file", "no such folder")):
        with pytest.raises(UserError) as error:
            find_runs([str(tmp_path / path)])
        assert str(error.value) == f"{tmp_path / path}: {what}; name a run's, or one that holds runs"
    with pytest.raises(UserError) as error:
        find_runs([str(tmp_path / "empty")])
    assert str(error.value) == (
        f"{tmp_path / 'empty'}: no run is here or in its folders; name a run's, or one that holds runs"
    )


def test_times():
    assert [readable_age(s) for s in (-1, 0, 119, 120, 7200, 172800)] == [
        "0 s",
        "0 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]
    assert [readable_time(s) for s in (0, 59.7, 3723)] == ["0:00", "1:00", "1:02:03"]
