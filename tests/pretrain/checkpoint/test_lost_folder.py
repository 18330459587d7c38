"""A run outlives its folder: moved away, replaced by an empty mount point, full to the last byte."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plait.launch.rank_process import log_to
from plait.pretrain.callbacks import Checkpointing, MetricsFile, TensorBoard
from plait.pretrain.callbacks.base import Callback
from plait.pretrain.checkpoint import CheckpointError, Checkpoints
from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.run_folder import RunFolder, read_status
from plait.pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class At(Callback):
    """Does something after certain steps, when the save of the step is through."""

    def __init__(self, deeds: dict[int, Callable[[], object]]) -> None:
        self.deeds = deeds

    def step(self, trainer: Trainer, metrics: dict) -> None:
        thread = trainer.checkpoints._thread
        if thread is not None:
            thread.join()
        if deed := self.deeds.get(metrics["step"]):
            deed()


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Checkpoints(folder / "checkpoints").all()]


def train(tiny: dict, deeds: dict[int, Callable[[], object]]) -> Trainer:
    tiny["train"] |= {"steps": 8, "batch_size": 1}
    tiny["log"] |= {"every": 1}
    tiny["checkpoint"] |= {"every": 2, "keep": 9}
    del tiny["data"]["validation"]
    callbacks = [MetricsFile(), TensorBoard(), Checkpointing(), At(deeds)]
    trainer = Trainer(parse_config(tiny, "test"), callbacks)
    trainer.run()
    return trainer


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("leaves", ["nothing", "a mount point"])
def test_a_folder_that_goes_away_and_comes_back(
    tiny: dict, tmp_path: Path, leaves: str, warned: Callable[[], list[str]]
) -> None:
    run, aside, left = tmp_path / "run", tmp_path / "aside", []

    def away() -> None:
        run.rename(aside)
        if leaves == "a mount point":
            run.mkdir()

    def back() -> None:
        if leaves == "a mount point":
            left.extend(run.iterdir())
            run.rmdir()
        assert not run.exists()
        aside.rename(run)

    trainer = train(tiny, {3: away, 5: back})
    assert trainer.state.step == 8
    assert left == []
    assert steps(run) == [2, 6, 8]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))
    assert read_status(RunFolder(run))["state"] == "finished"
    lines = warned()
    (refused,) = (line for line in lines if "not written" in line)
    assert refused == (
        f"{run}/checkpoints/step-00000004: not written: {run} is no longer the folder that the run began in; "
        "bring it back; older checkpoints are as they were"
    )
    about = [line for line in lines if "metrics.jsonl" in line]
    assert [line.partition(": ")[2].partition(":")[0] for line in about] == [
        "cannot be written",
        "is written again",
    ]
    assert len([line for line in lines if "tensorboard" in line]) == 1


def test_a_folder_that_stays_away(tiny: dict, tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    """The last save is an error, and the mount point stays empty."""
    run, aside = tmp_path / "run", tmp_path / "aside"

    def away() -> None:
        run.rename(aside)
        run.mkdir()

    with pytest.raises(CheckpointError, match=r"step-00000008: not written: .* is no longer the folder"):
        train(tiny, {3: away})
    assert list(run.iterdir()) == []
    assert steps(aside) == [2]
    assert any("metrics.jsonl: 5 lines are not written" in line for line in warned())


def test_a_disk_mounted_again_is_known(tmp_path: Path) -> None:
    """It may have another number, as a copy has."""
    folder = RunFolder(tmp_path / "run")
    file = folder.lock()
    assert folder.absence() is None
    shutil.copytree(folder.path, tmp_path / "copy")
    shutil.rmtree(folder.path)
    assert folder.absence() == f"{folder.path} is no longer the folder that the run began in"
    (tmp_path / "copy").rename(folder.path)
    assert folder.absence() is None
    (folder.path / ".lock").write_text("1 another\n")
    assert folder.absence() is not None
    file.close()


def test_a_last_save_that_fails_is_no_running_run(tiny: dict, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"

    class Removes(Checkpointing):
        def end(self, trainer: Trainer) -> None:
            # The save of the last step is under way or through; its failure is heard of here.
            trainer.checkpoints._failure = CheckpointError("the last one")
            super().end(trainer)

    tiny["train"]["steps"] = 4
    trainer = Trainer(parse_config(tiny, "test"), [Removes()])
    with pytest.raises(CheckpointError, match="the last one"):
        trainer.run()
    assert read_status(trainer.folder)["state"] == "failed"
    assert checkpoints.is_dir()
    # The lock is let go of.
    trainer.folder.lock().close()


def test_the_log_outlives_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    logger = logging.getLogger("plait")
    before = logger.handlers[:], logger.level
    file = tmp_path / "logs" / "rank.log"
    file.parent.mkdir()
    try:
        log_to(file)
        logger.warning("one")
        file.parent.rename(tmp_path / "aside")
        logger.warning("two")
        (tmp_path / "aside").rename(file.parent)
        logger.warning("three")
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.level = before
    assert [line.rpartition(" ")[2] for line in file.read_text().splitlines()] == ["one", "three"]
    assert capsys.readouterr().err.splitlines() == ["plait: one", "plait: two", "plait: three"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("NOT TESTED: a disk that is full in earnest needs the right to mount one (be root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("known", [True, False], ids=["known before", "while it is written"])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk(
    tiny: dict,
    small_disk: Path,
    known: bool,
    warned: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not known:
        # Another process takes the room after it was reckoned.
        monkeypatch.setattr("plait.pretrain.checkpoint.checkpoints.check_free_space", lambda *_: None)
    filler = small_disk / "filler"
    run = small_disk / "run"
    tiny["run"]["dir"] = str(run)

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)) == 4096:
                    pass
            except OSError:
                pass

    trainer = train(tiny, {3: fill, 5: filler.unlink})
    assert trainer.state.step == 8
    assert steps(run) == [2, 6, 8]
    for checkpoint in Checkpoints(run / "checkpoints").all():
        checkpoint.verify()
    assert [record["step"] for record in map(json.loads, (run / "metrics.jsonl").open())] == list(range(1, 9))
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]
    refused = [line for line in warned() if "not written" in line]
    assert len(refused) == 1
    assert refused[0].startswith(f"{run}/checkpoints/step-00000004: not written: ")
    assert ("are free" if known else "No space left on device") in refused[0]
    assert "make room; older checkpoints are as they were" in refused[0]
