"""Shards made to do harm."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostility import COUNTS, drawn, endless, folder, hostile_json, nested, pipe, scratch, survived, terabyte

from plait.data.shards import Shard


@pytest.mark.parametrize("count", COUNTS)
def test_shards(corpus: Path, tmp_path: Path, count: int) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    prefix = tmp_path / "corpus" / "train"
    whole = {
        name: (prefix.parent / name).read_bytes() for name in ("train.idx", "train.bin", "manifest.json")
    }
    tree = json.loads(whole["manifest.json"])
    # Megatron's reader takes its time to import, once.
    assert len(Shard(prefix).tokens(0, 5)) == 5

    def read() -> None:
        shard = Shard(prefix)
        shard.read(0, shard.num_tokens)
        for _ in shard.document_lengths():
            pass
        _ = shard.content
        shard.document_at(shard.num_tokens // 2)
        shard.check_index()

    @drawn(count)
    def _(draw: random.Random) -> None:
        for name, data in whole.items():
            (prefix.parent / name).write_bytes(data)
        name = draw.choice(["train.idx", "train.idx", "train.bin", "manifest.json"])
        changed = hostile_json(tree, whole[name], draw) if name == "manifest.json" else None
        (prefix.parent / name).write_bytes(changed or scratch(whole[name], draw))
        if name == "train.idx" and draw.random() < 0.5:
            (prefix.parent / "manifest.json").unlink()
        survived(read)


@pytest.mark.parametrize("harm", [pipe, endless, folder, terabyte, nested])
@pytest.mark.parametrize("name", ["manifest.json", "train.idx"])
def test_what_is_no_file_of_a_corpus(
    corpus: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    harm(tmp_path / "corpus" / name)
    (said,) = survived(lambda: Shard(tmp_path / "corpus" / "train"))
    assert str(tmp_path / "corpus") in said
