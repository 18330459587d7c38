"""Hugging Face folders made to do harm."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hostility import (
    COUNTS,
    drawn,
    endless,
    folder,
    hostile_json,
    nested,
    pipe,
    reshape,
    scratch,
    survived,
    terabyte,
)

from plait.pretrain.huggingface.loading import load_folder


@pytest.mark.parametrize("count", COUNTS)
def test_folders_of_hugging_face(huggingface: Path, count: int) -> None:
    whole = {path.name: path.read_bytes() for path in huggingface.iterdir() if path.is_file()}
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(shards) > 1
    assert load_folder(huggingface).model

    @drawn(count)
    def _(draw: random.Random) -> None:
        for name, data in whole.items():
            (huggingface / name).write_bytes(data)
        name = draw.choice(["config.json", "model.safetensors.index.json", *shards[:2]])
        data = whole[name]
        if name.endswith(".json"):
            changed = hostile_json(json.loads(data), data, draw)
        elif draw.random() < 0.7:
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(reshape(json.loads(data[8 : 8 + size]), draw)).encode("ascii")
            changed = len(header).to_bytes(8, "little") + header + data[8 + size :]
        else:
            changed = scratch(data[: min(len(data), 4000)], draw) + data[4000:]
        (huggingface / name).write_bytes(changed)
        survived(lambda: load_folder(huggingface))


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_is_no_file_of_a_hugging_face_folder(
    huggingface: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(huggingface / name)
    (said,) = survived(lambda: load_folder(huggingface))
    assert str(huggingface) in said


def test_pickles_are_not_opened(huggingface: Path) -> None:
    for path in huggingface.glob("*.safetensors*"):
        path.unlink()
    (huggingface / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    (said,) = survived(lambda: load_folder(huggingface))
    assert "its weights are pickles (pytorch_model.bin)" in said
