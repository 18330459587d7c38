"""Saving goes on whatever the disk does: what stays, what is read back, room, folders that go away."""

import errno
import os
import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plait.errors import UserError
from plait.pretrain.callbacks import Checkpointing
from plait.pretrain.callbacks.base import Callback
from plait.pretrain.checkpoint import CheckpointError, Checkpoints, checkpoints, files, storage
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

Usage = namedtuple("Usage", "total used free")


def some(value: float = 1.0) -> dict[str, Tensor]:
    return {"model.weight": torch.full((70, 5), value), "optim.step": torch.tensor(int(value))}


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Checkpoints(folder).all()]


def test_multiples_stay_for_ever(tmp_path: Path) -> None:
    saving = Checkpoints(tmp_path, keep=2, keep_every=30, background=True)
    for step in range(0, 110, 10):
        saving.save(step, some(step), {})
    saving.wait()
    assert steps(tmp_path) == [0, 30, 60, 90, 100]
    with pytest.raises(ValueError, match="keep_every = 0"):
        Checkpoints(tmp_path, keep_every=0)


def test_multiples_must_be_steps_that_are_saved(tiny: dict) -> None:
    tiny["checkpoint"] |= {"every": 500, "keep_every": 1400}
    with pytest.raises(UserError) as caught:
        parse_config(tiny, "c.yaml")
    assert str(caught.value) == (
        "c.yaml: checkpoint.keep_every = 1400 is no multiple of checkpoint.every = 500, so that few of its "
        "steps are saved; set it to 1500"
    )


@pytest.mark.parametrize("name", ["rank-00000.bin", "metadata.json", "manifest.json"])
@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "the next"])
def test_what_reads_back_otherwise_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    saving = Checkpoints(tmp_path, keep=1, background=True)
    saving.save(1, some(1), {})
    saving.wait()
    honest = files.checksum

    def rotten(path: Path, *, from_disk: bool = False) -> str:
        if path.name == name:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        return honest(path, from_disk=from_disk)

    with monkeypatch.context() as patch:
        patch.setattr(files, "checksum", rotten)
        saving.save(step, some(2), {})
        with pytest.raises(CheckpointError) as caught:
            saving.wait()
    assert str(caught.value) == (
        f"{tmp_path}/step-{step:08d}: not written: {name} reads back other than it was written; look after "
        "the folder and its disk; older checkpoints are as they were"
    )
    assert os.listdir(tmp_path) == ["step-00000001"]
    newest = saving.newest()
    assert newest is not None
    newest.verify()
    tensors = some(0)
    newest.load_into(tensors)
    assert tensors["optim.step"].item() == 1
    saving.save(2, some(2), {})
    saving.wait()
    assert os.listdir(tmp_path) == ["step-00000002"]


def test_too_little_room_is_known_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Checkpoints(tmp_path, keep=1)
    saving.save(1, some(1), {})
    before = (tmp_path / "step-00000001").stat()

    def free(count: int, total: int = 1 << 50) -> None:
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(total, 0, count))

    free(1234)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "HashingFile", None)  # nobody gets as far as to open one
        with pytest.raises(CheckpointError) as caught:
            saving.save(2, some(2), {})
    said = re.fullmatch(
        f"{tmp_path}/step-00000002: not written: it takes ([0-9,]+) bytes and 1,234 are free; make room; "
        "older checkpoints are as they were",
        str(caught.value),
    )
    assert said, str(caught.value)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001").stat() == before

    needed = int(said[1].replace(",", ""))
    free(needed - 1)
    with pytest.raises(CheckpointError, match="not written"):
        saving.save(2, some(2), {})
    free(needed)
    saving.save(2, some(2), {})
    written = sum(path.stat().st_size for path in (tmp_path / "step-00000002").iterdir())
    assert written <= needed
    free(0, total=0)  # a file system that does not count
    saving.save(3, some(3), {})
    assert steps(tmp_path) == [3]


def test_room_is_reckoned_for_many_small_tensors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is the largest file then."""
    saving = Checkpoints(tmp_path)
    tensors = {f"model.layers.{i}.a.long.name.of.a.parameter": torch.zeros(1, 1, 1, 1) for i in range(2000)}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 0))
    with pytest.raises(CheckpointError) as caught:
        saving.save(1, tensors, {})
    needed = int(str(caught.value).partition("it takes ")[2].partition(" bytes")[0].replace(",", ""))
    monkeypatch.undo()
    saving.save(1, tensors, {})
    assert sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()) <= needed


def test_a_folder_removed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    saving = Checkpoints(folder, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_back", lambda path, record: shutil.rmtree(folder))
        saving.save(1, some(1), {})
        with pytest.raises(CheckpointError, match=r"not written: \.tmp-step-00000001 was removed while"):
            saving.wait()
    saving.save(2, some(2), {})
    saving.wait()
    assert steps(folder) == [2]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    warnings: list[str] = []
    saving = Checkpoints(tmp_path, keep=1, warn=warnings.append)
    saving.save(1, some(1), {})
    honest, calls = checkpoints.survey, 0

    def gone(folder: Path) -> list:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise OSError(number, os.strerror(number))
        return honest(folder)

    monkeypatch.setattr(checkpoints, "survey", gone)
    failing = [1]
    with pytest.raises(CheckpointError, match=f"step-00000002: not written: {os.strerror(number)}; "):
        saving.save(2, some(2), {})
    assert os.listdir(tmp_path) == ["step-00000001"]
    # When it is there again for the save, and gone for the clearing up after it: saved, and said.
    failing, calls = [2], 0
    saving.save(2, some(2), {})
    assert warnings == [f"{tmp_path}: older checkpoints not deleted: {os.strerror(number)}"]
    assert steps(tmp_path) == [1, 2]
    failing = []
    saving.save(3, some(3), {})
    assert steps(tmp_path) == [3]


class Away(Callback):
    """A mount that is gone from one step to another: a file is where the folder was. Waits for every
    write, so that what a step hears of it is the same each time."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.heard: dict[int, int] = {}

    def step(self, trainer: Trainer, metrics: dict) -> None:
        step, folder = metrics["step"], trainer.folder.checkpoints
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint-"):
                thread.join()
        aside = folder.with_name("aside")
        if step == self.first:
            folder.rename(aside)
            folder.write_text("not a folder")
        if step == self.last:
            folder.unlink()
            aside.rename(folder)


def run(tiny: dict, away: Away) -> Trainer:
    tiny["checkpoint"] |= {"every": 2, "keep": 3}
    trainer = Trainer(parse_config(tiny, "test"), [Checkpointing(), away])
    trainer.run()
    return trainer


def test_a_run_outlives_its_checkpoints_folder(tiny: dict, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tiny, Away(3, 7))
    folder = trainer.folder.checkpoints
    assert trainer.state.step == 12
    assert steps(folder) == [8, 10, 12]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [re.sub(r": not written: .*", "", line) for line in warned] == [
        f"{folder}/step-0000000{step}" for step in (4, 6)
    ]
    assert all("\n" not in line and "older checkpoints are as they were" in line for line in warned)


def test_the_warning_comes_at_the_next_step(tiny: dict, caplog: pytest.LogCaptureFixture) -> None:
    heard = []

    class Listener(Callback):
        def step(self, trainer: Trainer, metrics: dict) -> None:
            heard.append("not written" in caplog.text)

    tiny["checkpoint"]["every"] = 4
    trainer = Trainer(parse_config(tiny, "test"), [Checkpointing(), Away(5, 11), Listener()])
    trainer.run()
    assert heard == [False] * 8 + [True] * 4


def test_at_the_last_step_it_is_an_error(tiny: dict) -> None:
    with pytest.raises(CheckpointError, match="step-00000012: not written"):
        run(tiny, Away(11, 99))
    folder = Path(tiny["run"]["dir"])
    assert steps(folder / "aside") == [6, 8, 10]
