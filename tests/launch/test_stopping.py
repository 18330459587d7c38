"""A run that is asked to stop does so after a whole step, with a checkpoint, and goes on as if it had not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.launch.rank_process import LAUNCHED, seconds_since_launch
from plait.pretrain.callbacks import Callback, Checkpointing
from plait.pretrain.config import Config, TrainConfig
from plait.pretrain.config_file import dump_config, parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.run_folder import RunFolder, read_status
from plait.pretrain.stopping import Stopping
from plait.pretrain.trainer import Trainer

PATIENCE = 120


def config_of(tree: dict, **train: object) -> Config:
    tree["train"] |= train
    tree["checkpoint"] = {"every": 1000}
    return parse_config(tree, "test")


class Until(Callback):
    """Does something after a step."""

    def __init__(self, step, deed):
        self.at, self.deed = step, deed

    def step(self, trainer, metrics):
        if metrics["step"] == self.at:
            self.deed()


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_a_file_a_clock_or_a_signal_stop_it_after_a_whole_step(tiny):
    config = config_of(tiny, steps=50)
    folder = RunFolder(config.run.dir)
    asked: list[str] = []
    trainer = Trainer(
        config,
        [Checkpointing(), Until(3, lambda: asked.append("SIGUSR1"))],
        lambda: asked[0] if asked else None,
    )
    assert not trainer.run()
    # What comes after a step's sums were sent is heard of in the next step.
    assert (trainer.state.step, trainer.stopping.reason) == (4, "SIGUSR1 asked for it")
    assert read_status(folder) | {"time": 0} == {
        "state": "stopped",
        "step": 4,
        "reason": "SIGUSR1 asked for it",
        "starts": 1,
        "time": 0,
    }

    trainer = Trainer(config, [Checkpointing(), Until(6, folder.stop_file.touch)])
    assert trainer.resumed_from == 4
    assert not trainer.run()
    assert (trainer.state.step, trainer.stopping.reason) == (
        7,
        "a file named stop in its folder asked for it",
    )
    assert not folder.stop_file.exists()

    limited = config.model_copy(update={"train": config.train.model_copy(update={"time_limit": 0.5})})
    trainer = Trainer(limited, [Checkpointing(), Until(9, lambda: time.sleep(0.6))])
    assert trainer.resumed_from == 7
    assert not trainer.run()
    assert trainer.state.step <= 10
    assert trainer.stopping.reason == "train.time_limit is reached"

    trainer = Trainer(config, [Checkpointing()])
    assert trainer.run()
    assert read_status(folder)["state"] == "finished"


def test_the_clock_runs_on_over_restarts(monkeypatch):
    stopping = Stopping(time_limit=100.0)
    assert stopping.wishes() == [0.0, 0.0, 0.0]
    assert seconds_since_launch() == 0.0
    monkeypatch.setenv(LAUNCHED, str(time.time() - 200.0))
    stopping.spent(seconds_since_launch())
    assert stopping.wishes() == [0.0, 0.0, 1.0]


def test_an_error_and_an_end_that_was_asked_for_are_told(tiny):
    config = config_of(tiny, steps=50, stop_at=2)
    folder = RunFolder(config.run.dir)
    assert not Trainer(config, [Checkpointing()]).run()
    status = read_status(folder)
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 2, None)

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Trainer(config_of(tiny, steps=50, stop_at=5), [Until(3, fail)]).run()
    assert read_status(folder)["state"] == "failed"


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90.0), ("90s", 90.0), ("11h50m", 42600.0), ("1d", 86400.0), (0.5, 0.5)]
)
def test_durations(text, seconds):
    assert TrainConfig(steps=1, batch_size=1, time_limit=text).time_limit == seconds


@pytest.mark.parametrize("text", ["90", "1h 5m", "m", "-3s", 0, True])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="time_limit"):
        TrainConfig(steps=1, batch_size=1, time_limit=text)


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "plait.launch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written(tree: dict, folder: Path, **train: object) -> Path:
    config = config_of(tree, **train)
    file = folder / "config.yaml"
    file.write_text(dump_config(config))
    return file


@pytest.mark.long
def test_two_ranks_stop_after_the_same_step_and_go_on_as_if_nothing_had_been(tiny, tmp_path):
    tiny["parallel"] = {"sp": 2}
    tiny["model"]["pattern"] = "M"
    file = written(tiny, tmp_path, steps=400)
    folder = Path(tiny["run"]["dir"])
    process = start("launch", "local", file)
    wait_for_step(folder, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    stopped = read_status(RunFolder(folder))["step"]
    assert 5 <= stopped < 400
    assert f"stopped at step {stopped} of 400: SIGUSR1 asked for it" in " ".join(out.split())
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == [f"step-{stopped:08d}"]

    last = stopped + 3
    again = start("launch", "local", file, f"train.stop_at={last}")
    assert again.wait(timeout=PATIENCE) == 0
    whole = start("launch", "local", file, f"train.stop_at={last}", f"run.dir={tmp_path / 'whole'}")
    assert whole.wait(timeout=PATIENCE) == 0
    assert losses(folder) == losses(tmp_path / "whole")


def test_one_process_stops_when_it_is_told_and_dies_when_it_is_told_again(tiny, tmp_path):
    file = written(tiny, tmp_path, steps=100_000)
    folder = Path(tiny["run"]["dir"])
    process = start("train", file)
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert "Ctrl-C again ends at once" in err
    assert read_status(RunFolder(folder))["reason"] == "SIGINT asked for it"

    process = start("train", file)
    wait_for_step(folder, read_status(RunFolder(folder))["step"] + 2, process)
    os.kill(process.pid, signal.SIGSTOP)
    # Both wait for it when it goes on; which is heard first is the system's choice.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=PATIENCE) in (-signal.SIGINT, -signal.SIGTERM)
