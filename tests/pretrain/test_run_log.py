"""run.log: a run's life, a line an event, and nothing that can end it."""

import errno
import os
import re
from pathlib import Path

import pytest

from plait.errors import UserError
from plait.pretrain import run_folder
from plait.pretrain.callbacks import Callback, Checkpointing, Evaluation, RunLog
from plait.pretrain.config_file import parse_config
from plait.pretrain.run_folder import read_status
from plait.pretrain.run_log import last_note, note
from plait.pretrain.trainer import Trainer

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  "


def events(folder: Path) -> list[str]:
    lines = (folder / "run.log").read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines), lines
    return [line.partition("  ")[2] for line in lines]


def live(tree: dict, *more: Callback, **train: object) -> Trainer:
    tree["train"] |= train
    trainer = Trainer(parse_config(tree, "test"), [Evaluation(), *more, RunLog(), Checkpointing()])
    trainer.run()
    return trainer


def matches(lines: list[str], *patterns: str) -> bool:
    return len(lines) == len(patterns) and all(map(re.fullmatch, patterns, lines))


class Do(Callback):
    def __init__(self, at: int, deed) -> None:
        self.at, self.deed = at, deed

    def step(self, trainer, metrics):
        if metrics["step"] == self.at:
            self.deed()


def test_a_life_in_lines(tiny):
    tiny["model"]["pattern"] = "M"
    tiny["checkpoint"]["async"] = False
    folder = live(tiny, stop_at=6).folder
    place = r"one rank on cpu, rank 0 is process \d+ on \S+; plait \S+, torch \S+"
    saved = r"checkpoint saved: step {}, \d+ kB in \d+\.\d s"
    took = r"tokens, 0:\d\d since the start"
    assert matches(
        events(folder.path),
        rf"started: new, from seed 3; steps 0 to 6; {place}",
        saved.format(4),
        r"evaluated: step 6, validation loss \d\.\d{4}",
        saved.format(6),
        rf"stopped: step 6 of 12, 1\.2k {took}",
    )
    before = len(events(folder.path))
    tiny["optim"]["lr"] = 0.02
    live(tiny, Do(7, folder.stop_file.touch), stop_at=None)
    assert matches(
        events(folder.path)[before:],
        rf"started: resumed from the checkpoint of step 6; steps 6 to 12; {place}",
        r"changed since the checkpoint: optim\.lr = 0\.02, was 0\.01",
        r"stopping: a file named stop in its folder asked for it",
        saved.format(8),
        rf"stopped: step 8 of 12, 1\.6k {took}",
    )
    before = len(events(folder.path))
    live(tiny)
    assert events(folder.path)[-1].startswith("finished: step 12 of 12, 2.4k tokens")
    assert read_status(folder)["starts"] == 3


def test_a_checkpoint_that_was_not_saved_is_told_of(tiny):
    tiny["model"]["pattern"] = "M"
    folder = Path(tiny["run"]["dir"])
    checkpoints = folder / "checkpoints"
    live(tiny, Do(3, lambda: checkpoints.write_text("in its way")), Do(5, checkpoints.unlink), steps=6)
    told = [event for event in events(folder) if event.startswith("checkpoint")]
    assert told[0].startswith(f"checkpoint not saved: {folder}/checkpoints/step-00000004: not written: ")
    assert len(told) == 2
    assert told[1].startswith("checkpoint saved: step 6")


def test_an_error_is_the_reason_of_a_failed_run(tiny):
    tiny["model"]["pattern"] = "M"

    def fail():
        raise RuntimeError("no\nmore")

    with pytest.raises(RuntimeError):
        live(tiny, Do(2, fail))
    trainer = Trainer(parse_config(tiny, "test"))
    status = read_status(trainer.folder)
    assert (status["state"], status["step"], status["reason"]) == ("failed", 2, "RuntimeError: no more")


def test_a_disk_that_takes_nothing_does_not_end_a_run(tiny, monkeypatch, caplog):
    tiny["model"]["pattern"] = "M"
    folder = Path(tiny["run"]["dir"])
    folder.mkdir()
    (folder / "run.log").symlink_to("/dev/full")

    write_whole = run_folder._write_whole

    def refuse(path, text):
        if path.name == "status.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, text)

    monkeypatch.setattr(run_folder, "_write_whole", refuse)
    assert live(tiny, steps=4).state.step == 4
    assert f"{folder}/status.json: cannot be written: No space left on device; the run is" in caplog.text


def test_notes(tmp_path):
    note(tmp_path / "gone", "nobody hears")
    assert not (tmp_path / "gone").exists()
    assert last_note(tmp_path) is None
    note(tmp_path, "one\n  two\x1b[31m \udcff")
    with (tmp_path / "run.log").open("a") as file:
        file.write("2026-01-01 00:00:00+00:00  cut sh")
    note(str(tmp_path), "after")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert re.fullmatch(TIME + r"one two\?\[31m \?", lines[0])
    assert lines[1].endswith("cut sh")
    assert last_note(tmp_path) == "after"
    assert len(lines) == 3
    (tmp_path / "run.log").write_bytes(b"\xff\n")
    assert last_note(tmp_path) is None


def test_the_command_tells_of_its_error(tiny, tmp_path, monkeypatch):
    import yaml

    from plait.launch.cli import main

    file = tmp_path / "c.yaml"
    tiny["model"]["pattern"] = "M"
    file.write_text(yaml.dump(tiny))
    words = ["optim.lr=1e30", "optim.warmup_steps=0", "evaluate.every=1"]
    monkeypatch.setattr("sys.argv", ["plait", "train", str(file), *words])
    with pytest.raises((SystemExit, UserError)):
        main()
    folder = Path(tiny["run"]["dir"])
    assert (last_note(folder) or "").startswith(
        "failed: step 2: the loss is nan and the gradient's norm nan; lower"
    )
