"""`plait runs`: a row a run, whole at any width; for scripts; live."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from plait.pretrain.run_folder import RunFolder, write_status

REASON = (
    "step 8: the loss is nan and the gradient's norm nan; lower optim.lr = 30 or lengthen optim.warmup_steps"
)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A folder of two runs, one that goes on and one that failed; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, state, reason in (("bad", "failed", REASON), ("good", "running", None)):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.path.mkdir(parents=True)
        folder.config_file.write_text("train: {steps: 100, stop_at: 50}\n")
        write_status(folder, state, 7, reason)
        folder.metrics_file.write_text(
            json.dumps(
                {
                    "step": 7,
                    "loss": float("nan") if reason else 2.0,
                    "step_seconds": 2.0,
                    "tokens_per_second": 5e3,
                }
            )
            + "\n"
        )
    return tmp_path / "runs"


@pytest.fixture
def plait(plait):
    """Run `plait runs`."""
    return partial(plait, "runs")


def test_a_row_a_run(runs, plait):
    with RunFolder(runs / "good").lock():
        code, out, _ = plait()
    header, bad, good = (line.rstrip() for line in out.splitlines())
    assert code == 0
    names = "run state step loss validation tok/s left checkpoint restarts quiet reason"
    assert header.split() == names.split()
    assert re.fullmatch(rf"runs/bad +failed +7/50 +nan +5\.0k +0 +\d+ s +{re.escape(REASON)}", bad)
    assert re.fullmatch(r"runs/good +running +7/50 +2\.0000 +5\.0k +1:26 +0 +\d+ s", good)
    # Without reasons there is no column for them.
    assert "reason" not in plait(runs / "good")[1]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_leaves_nothing_out(runs, plait, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    out = re.sub(r"\x1b\[[0-9;]*m", "", plait()[1])
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width
    words = set(out.split())
    assert {
        "runs/bad",
        "runs/good",
        "failed",
        "died",
        "7/50",
        "nan",
        "2.0000",
        "5.0k",
        *REASON.split(),
    } <= words


def test_for_scripts(runs, plait):
    code, out, _ = plait("--json", runs)
    bad, good = json.loads(out)
    assert code == 0
    assert (bad["state"], bad["loss"], bad["reason"]) == ("failed", None, REASON)
    assert (good["state"], good["step"], good["steps"], good["loss"]) == ("died", 7, 50, 2.0)
    assert set(good) == {
        *("run", "state", "step", "steps", "loss", "validation_loss", "tokens_per_second", "seconds_left"),
        *("checkpoint", "checkpoint_age", "restarts", "quiet", "host", "pid", "reason"),
    }


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_watch_without_a_terminal_is_a_line_a_look(runs, plait, monkeypatch, form):
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = plait("--watch", "--interval", "0.5", runs / "good", *form)
    assert (code, looks) == (0, [0.5, 0.5])
    lines = out.splitlines()
    assert len(lines) == 2
    for line in lines:
        if form:
            assert json.loads(line)[0]["step"] == 7
        else:
            assert re.fullmatch(
                rf"\S+ \S+  {runs}/good  died  step 7/50  loss 2\.0000  tok/s 5\.0k  restarts 0  quiet \d+ s",
                line,
            )


def test_a_watch_in_a_terminal_shows_what_changes_and_ends_with_ctrl_c(runs):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "plait.launch", "runs", "--watch", "--interval", "0.1"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"COLUMNS": "200", "LINES": "5", "TERM": "xterm"},
    )
    os.close(slave)
    shown = ""

    def read_until(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(master, 1 << 16).decode()

    try:
        read_until("Ctrl-C ends")
        read_until("died")
        write_status(RunFolder(runs / "good"), "finished", 50)
        read_until("finished")
        process.send_signal(signal.SIGINT)
        # The window is given back, and the last look stays.
        shown = shown.rpartition("\x1b[?1049l")[2]
        read_until("\x1b[?1049l")
        shown = shown.rpartition("\x1b[?1049l")[2]
        read_until("50/50")
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "runs: no such folder; name a run's, or one that holds runs"),
        (["none"], "none: no such folder; name a run's, or one that holds runs"),
        (["empty"], "empty: no run is here or in its folders; name a run's, or one that holds runs"),
        (["none", "--watch"], "none: no such folder; name a run's, or one that holds runs"),
    ],
)
def test_no_run_there(plait, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert plait(*words) == (2, "", f"plait: error: {line}\n")


def test_it_needs_no_torch(runs):
    code = (
        "import sys; sys.argv = ['plait', 'runs']\n"
        "from plait.launch.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/good" in done.stdout
