"""Checkpoints on one rank: bits come back, damage is named, a failed save harms nothing."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.errors import UserError
from plait.pretrain.checkpoint import Checkpoint, CheckpointError, Checkpoints, storage
from plait.pretrain.checkpoint.index import DTYPES


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern, so also infinities, subnormals and NaNs of every payload."""
    if dtype == torch.bool:
        return torch.randint(2, shape).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def some(value: float = 1.0) -> dict[str, Tensor]:
    return {"model.weight": torch.full((7, 5), value), "optim.step": torch.tensor(int(value))}


def load(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
    assert checkpoint is not None
    tensors = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in checkpoint.tensors.items()}
    checkpoint.load_into(tensors)
    return tensors


def save_and_wait(checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor]) -> None:
    checkpoints.save(step, tensors, {})
    checkpoints.wait()


@pytest.fixture(params=[False, True], ids=["foreground", "background"])
def background(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, background: bool) -> None:
    shapes = [(), (1,), (0,), (3, 0, 2), (63,), (5, 7), (2, 3, 4, 5)]
    tensors = {
        f"{name}.{shape}": random_bits(shape, dtype) for name, dtype in DTYPES.items() for shape in shapes
    }
    tensors["view"] = torch.randn(6, 8).t()[1::2, ::3]
    tensors["one element"] = torch.randn(6, 8)[2:3, 1:2].t()
    tensors["expanded"] = torch.randn(3, 1).expand(3, 4)
    tensors["parameter"] = torch.nn.Parameter(torch.randn(4))
    checkpoints = Checkpoints(tmp_path / "new" / "folder", background=background)
    checkpoints.save(3, tensors, {"cursor": 12, "loss": 0.1 + 0.2, "blend": {"a": (1, 2)}})
    checkpoints.wait()

    newest = Checkpoints(tmp_path / "new" / "folder").newest()
    assert newest is not None
    assert newest == Checkpoint(tmp_path / "new" / "folder" / "step-00000003", 3)
    assert newest.manifest.facts == {"cursor": 12, "loss": 0.1 + 0.2, "blend": {"a": [1, 2]}}
    assert sorted(newest.names()) == sorted(tensors)
    loaded = load(newest)
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in tensors.items())
    newest.verify()
    assert all(c.position % 64 == 0 for t in newest.tensors.values() for c in t.chunks)


def test_loads_in_place_whatever_the_targets_strides(tmp_path: Path) -> None:
    source = {"a": torch.randn(6, 4), "b": torch.randn(3)}
    Checkpoints(tmp_path).save(1, source, {})
    base = torch.zeros(4, 12)
    parameter = torch.nn.Parameter(torch.zeros(3))
    (checkpoint,) = Checkpoints(tmp_path).all()
    checkpoint.load_into({"a": base.t()[::2], "b": parameter})
    assert torch.equal(base.t()[::2], source["a"])
    assert not base.t()[1::2].any()
    assert torch.equal(parameter.detach(), source["b"])
    grid = torch.zeros(4, 4)
    checkpoint.load_into({"b": grid[1:4, 2]}, partial=True)
    assert torch.equal(grid[1:4, 2], source["b"])
    assert grid.count_nonzero() == 3
    with pytest.raises(ValueError, match="'a' is on the meta device"):
        checkpoint.load_into({"a": torch.empty(6, 4, device="meta"), "b": parameter})


def test_what_changes_after_save_is_not_saved(tmp_path: Path, background: bool) -> None:
    checkpoints = Checkpoints(tmp_path, background=background)
    tensors = {f"w{i}": torch.full((64, 1024), 0.0) for i in range(20)}
    facts = {"cursor": [0]}
    for step in range(1, 4):
        for tensor in tensors.values():
            tensor.fill_(step)
        facts["cursor"][0] = step
        checkpoints.save(step, tensors, facts)
        for tensor in tensors.values():
            tensor.fill_(-1)
        facts["cursor"][0] = -1
    checkpoints.wait()
    for step, checkpoint in enumerate(checkpoints.all(), start=1):
        assert checkpoint.manifest.facts == {"cursor": [step]}
        assert all((tensor == step).all() for tensor in load(checkpoint).values())


def test_keeps_the_newest_and_leaves_no_rubbish(tmp_path: Path, background: bool) -> None:
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / "rank-00000.bin").write_bytes(b"left by a run that died")
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, some(step), {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000003", "step-00000004"]


def test_newest_is_the_last_saved_after_going_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, value in ((100, 1), (200, 2), (300, 3), (200, 4)):
        checkpoints.save(step, some(value), {"value": value})
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.manifest.facts) == (200, {"value": 4})
    assert load(newest)["optim.step"].item() == 4
    assert [c.step for c in checkpoints.all()] == [300, 200]


def test_a_save_that_fails_harms_no_older_one(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=background)
    checkpoints.save(1, some(1), {})
    checkpoints.wait()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in (1, 2):  # the same one anew, and the next one
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "fsync", full)
            with pytest.raises(CheckpointError, match="not written: No space left") as caught:
                save_and_wait(checkpoints, step, some(9))
        assert str(caught.value).startswith(f"{tmp_path}/step-0000000{step}: ")
        checkpoints.wait()  # reported once
        assert os.listdir(tmp_path) == ["step-00000001"]
        assert load(checkpoints.newest())["optim.step"].item() == 1

    checkpoints.save(3, some(3), {})
    checkpoints.wait()
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file").newest()
    with pytest.raises(CheckpointError, match="not written"):
        Checkpoints(tmp_path / "file").save(1, some(), {})
    with pytest.raises(CheckpointError, match="not written: Not a directory"):
        Checkpoints(tmp_path / "file" / "below").save(1, some(), {})


def truncate(folder: Path) -> str:
    os.truncate(folder / "rank-00000.bin", 10)
    return r"rank-00000.bin: has 10 of \d+ bytes"


def lose(folder: Path) -> str:
    (folder / "metadata.json").unlink()
    return "metadata.json: No such file"


def lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json: No such file"


def edit_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"cursor": 5', '"cursor": 6'))
    return "manifest.json: damaged"


def garble_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_bytes(b"\xff{")
    return "manifest.json: not JSON"


@pytest.mark.parametrize("harm", [truncate, lose, lose_manifest, edit_manifest, garble_manifest])
def test_newest_skips_what_is_not_whole(tmp_path: Path, harm: Callable[[Path], str]) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=2, warn=warnings.append)
    checkpoints.save(1, some(1), {"cursor": 1})
    checkpoints.save(2, some(2), {"cursor": 5})
    reason = harm(tmp_path / "step-00000002")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert checkpoints.newest() == newest
    (warning,) = warnings
    assert re.search(f"checkpoint skipped: .*{reason}", warning)
    with pytest.raises(UserError, match=reason):
        Checkpoint(tmp_path / "step-00000002", 2).verify()
    # Saved anew, it is whole again; the good one survived until then.
    checkpoints.save(2, some(3), {})
    assert [c.step for c in checkpoints.all()] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["rank-00000.bin", "metadata.json", "manifest.json"])
def test_verify_finds_one_flipped_bit(tmp_path: Path, name: str) -> None:
    Checkpoints(tmp_path).save(1, some(1), {"cursor": 5})
    path = tmp_path / "step-00000001" / name
    whole = path.read_bytes()
    position = whole.find(b"5")  # in JSON: a digit that stays a digit
    position = len(whole) // 2 if position < 0 else position
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(UserError, match=f"{name}: damaged"):
        Checkpoint(tmp_path / "step-00000001", 1).verify()


def test_a_foreign_checkpoint_is_one_line(tmp_path: Path) -> None:
    saved = {f"layer.{i}.weight": torch.zeros(2, 3) for i in range(5)}
    Checkpoints(tmp_path).save(1, saved, {})
    (checkpoint,) = Checkpoints(tmp_path).all()

    wanted = {f"layers.{i}.weight": torch.zeros(2, 3) for i in range(5)}
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(wanted)
    assert str(caught.value) == (
        f"{checkpoint.path}: not a checkpoint of this model: it lacks layers.0.weight, layers.1.weight, "
        "layers.2.weight and 2 more and it also holds layer.0.weight, layer.1.weight, layer.2.weight and 2 "
        "more; use the config it was saved with, or start in another run.dir"
    )

    wanted = {name: torch.ones(2, 3) for name in saved}
    wanted["layer.3.weight"] = torch.ones(2, 4)
    wanted["layer.4.weight"] = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(wanted)
    assert str(caught.value) == (
        f"{checkpoint.path}: not a checkpoint of this model: other shape or dtype of layer.3.weight ((2, 3) "
        "float32 saved, (2, 4) float32 asked for), layer.4.weight ((2, 3) float32 saved, (2, 3) bfloat16 "
        "asked for); use the config it was saved with, or start in another run.dir"
    )
    assert wanted["layer.0.weight"].all()

    part = {"layer.2.weight": torch.ones(2, 3)}
    with pytest.raises(UserError, match=r"it also holds layer\.0\.weight"):
        checkpoint.load_into(part)
    checkpoint.load_into(part, partial=True)
    assert not part["layer.2.weight"].any()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (3, "'item' is of type int, no tensor; put it in the facts"),
        (torch.zeros(2, dtype=torch.complex64), "'item' is torch.complex64"),
        (torch.zeros(2, 2).to_sparse(), "'item' is torch.float32, torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "'item' is torch.float32, torch.strided, on meta"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(tmp_path: Path, item: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Checkpoints(tmp_path).save(1, {"item": item}, {})
    assert not list(tmp_path.iterdir())


def test_facts_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpoints(tmp_path).save(1, some(), {"path": tmp_path})
    with pytest.raises(ValueError, match="not JSON compliant"):
        Checkpoints(tmp_path).save(1, some(), {"loss": float("nan")})


def test_no_word_is_printed_and_the_end_of_the_process_waits(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from plait.pretrain.checkpoint import Checkpoints
tensors = {f"w{i}": torch.full((256, 1024), 3.0) for i in range(40)}
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1, background=True)
checkpoints.save(1, tensors, {})
checkpoints.wait()
checkpoints.newest().load_into(tensors)
checkpoints.save(2, tensors, {})
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_SHOW_CPP_STACKTRACES"}
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.step == 2
    newest.verify()
