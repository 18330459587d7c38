"""What is loaded is the newest checkpoint whose every byte is as it was written, on every rank the same."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.errors import UserError
from plait.pretrain.callbacks import Checkpointing
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config_file import parse_config
from plait.pretrain.loading import load_run
from plait.pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    return r"damaged: its checksum|not JSON"


def cut(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 3)
    return r"has \d+ of \d+ bytes|not JSON|damaged: its checksum"


def lose(path: Path) -> str:
    path.unlink()
    return "No such file or directory"


FILES = ["rank-00000.bin", "metadata.json", "manifest.json"]


def save(folder: Path, *steps: int) -> None:
    saving = Checkpoints(folder)
    for step in steps:
        saving.save(step, {"w": torch.full((100,), float(step))}, {"step": step})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [flip, cut, lose])
def test_the_one_before_is_taken(tmp_path: Path, name: str, harm: Callable[[Path], str]) -> None:
    save(tmp_path, 1, 2, 3)
    reason = harm(tmp_path / "step-00000003" / name)
    warned: list[str] = []
    newest = Checkpoints(tmp_path, warn=warned.append).newest_intact()
    assert newest is not None
    assert newest.step == 2
    (line,) = warned
    assert re.fullmatch(f"checkpoint skipped: {tmp_path}/step-00000003/{name}: ({reason}).*", line), line
    harm(tmp_path / "step-00000002" / name)
    harm(tmp_path / "step-00000001" / name)
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path, warn=warned.append).newest_intact()
    assert str(caught.value) == (
        f"{tmp_path}: none of its checkpoints is whole, and a new run would bury them; move the folder away "
        "to begin anew"
    )


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest_intact() is None
    assert Checkpoints(tmp_path).newest_intact() is None


def test_an_index_that_lies_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right: it was written so."""
    save(tmp_path, 1)
    from plait.pretrain.checkpoint import storage

    honest = storage.format_index
    monkeypatch.setattr(
        storage, "format_index", lambda index: honest(index).replace('"length": 400', '"length": 396')
    )
    save(tmp_path, 2)
    warned: list[str] = []
    newest = Checkpoints(tmp_path, warn=warned.append).newest_intact()
    assert newest is not None
    assert newest.step == 1
    assert "length = 396 is not that of" in warned[0]


@pytest.fixture
def run(tiny: dict) -> Path:
    """A run with checkpoints of the steps 4 and 8."""
    tiny["train"] |= {"steps": 8, "batch_size": 1}
    Trainer(parse_config(tiny, "test"), [Checkpointing()]).run()
    return Path(tiny["run"]["dir"])


def test_a_training_goes_on_from_it(run: Path, tiny: dict, caplog: pytest.LogCaptureFixture) -> None:
    step = run / "checkpoints" / "step-00000008"
    weights = load_run(f"{run}@8").model.state_dict()
    flip(step / "rank-00000.bin")
    trainer = Trainer(parse_config(tiny, "test"), [Checkpointing()])
    assert trainer.resumed_from == 4
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        f"checkpoint skipped: {step}/rank-00000.bin: damaged: its checksum is not the one of manifest.json; "
        "use another checkpoint"
    ]
    trainer.run()
    again = load_run(f"{run}@8").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_who_only_reads_takes_it_too(run: Path, tiny: dict, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints" / "step-00000008" / "rank-00000.bin")
    assert load_run(str(run)).step == 4
    assert capsys.readouterr().err.startswith("plait: warning: checkpoint skipped: ")
    with pytest.raises(UserError, match=r"step-00000008/rank-00000.bin: damaged: its checksum is not"):
        load_run(f"{run}@8")
    second = tiny | {"run": {"dir": f"{run}-2", "seed": 3}, "checkpoint": {"init_from": str(run)}}
    trainer = Trainer(parse_config(second, "test"))
    assert trainer.begun_from == f"step 4 of {run}"
    trainer.close()
    shutil.rmtree(f"{run}-2")
    second["checkpoint"]["init_from"] = f"{run}@8"
    with pytest.raises(UserError, match=rf"checkpoint.init_from = {run}@8: .*rank-00000.bin: damaged"):
        Trainer(parse_config(second, "test"))
    flip(run / "checkpoints" / "step-00000004" / "metadata.json")
    with pytest.raises(UserError, match="holds no whole checkpoint yet"):
        load_run(str(run))
