import shutil
from pathlib import Path

import numpy as np
import pytest

from plait.data.shards import Shard
from plait.errors import UserError

# Several sequences a document, empty documents at the start, in a row, and at the end, and a
# document whose only sequence is empty.
DOCUMENTS = [[], [5], [3, 4, 2], [], [], [0], [1], [7, 0, 6], [11], []]


def starts_of(documents: list[list[int]]) -> set[int]:
    lengths = [sum(document) for document in documents]
    return {sum(lengths[:i]) for i, length in enumerate(lengths) if length}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("modes", [False, True])
def test_every_read_of_raw_shards(write_shards, dtype: type, modes: bool) -> None:
    prefix, stream = write_shards(DOCUMENTS, dtype=dtype, modes=modes)
    shard = Shard(prefix)
    assert (shard.num_tokens, shard.num_documents, shard.manifest) == (39, 10, None)
    begins = starts_of(DOCUMENTS)
    for start in range(39):
        for length in range(1, 39 - start + 1):
            tokens, starts = shard.read(start, length)
            assert tokens.dtype == np.int64
            assert np.array_equal(tokens, stream[start : start + length])
            assert {start + int(i) for i in np.flatnonzero(starts)} == begins & set(
                range(start, start + length)
            )


def test_documents_by_number(write_shards) -> None:
    shard = Shard(write_shards(DOCUMENTS)[0])
    lengths = [sum(document) for document in DOCUMENTS]
    assert np.concatenate(list(shard.document_lengths(step=3))).tolist() == lengths
    assert [shard.document_start(d) for d in range(11)] == [0, *np.cumsum(lengths)]
    assert [shard.document_at(token) for token in (0, 4, 5, 13, 14, 15, 38)] == [1, 1, 2, 2, 6, 7, 8]


def test_arrays_outlive_the_shard(write_shards) -> None:
    prefix, stream = write_shards([[1000], [1000]])
    shard = Shard(prefix)
    tokens, starts = shard.read(0, 2000)
    del shard
    assert np.array_equal(tokens, stream)
    assert np.flatnonzero(starts).tolist() == [0, 1000]


def test_reading_outside_is_refused(write_shards) -> None:
    shard = Shard(write_shards([[10]])[0])
    for start, length in ((-1, 2), (0, 11), (10, 1), (3, 0)):
        with pytest.raises(IndexError):
            shard.read(start, length)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_cut_is_noticed(write_shards, suffix: str) -> None:
    prefix, _ = write_shards(DOCUMENTS)
    path = Path(f"{prefix}.{suffix}")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            Shard(prefix)
        assert str(path) in str(error.value)
    path.write_bytes(whole + b"xx")
    with pytest.raises(UserError):
        Shard(prefix)


def test_cut_names_both_sizes(write_shards) -> None:
    prefix, _ = write_shards([[100]])
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=r"raw.bin: 150 bytes, but .*raw.idx describes 200"):
        Shard(prefix)


def test_other_formats_are_refused(write_shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.bin: no such file"):
        Shard(tmp_path / "missing")
    prefix, _ = write_shards([[10]], dtype=np.float32)
    with pytest.raises(UserError, match="dtype code 7"):
        Shard(prefix)
    prefix, _ = write_shards([[10]])
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    index.write_bytes(b"TNTIDX\0\0\0" + whole[9:])
    with pytest.raises(UserError, match="not a Megatron index"):
        Shard(prefix)
    index.write_bytes(whole[:9] + b"\2" + whole[10:])
    with pytest.raises(UserError, match="version 2"):
        Shard(prefix)
    prefix, _ = write_shards([[]])
    with pytest.raises(UserError, match="no documents"):
        Shard(prefix)
    prefix, _ = write_shards([[0]])
    with pytest.raises(UserError, match="no tokens"):
        Shard(prefix)


def test_content_tells_shards_apart_wherever_they_lie(write_shards, tmp_path: Path) -> None:
    prefix, _ = write_shards([[10], [20]])
    content = Shard(prefix).content
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"copy.{suffix}")
    assert Shard(tmp_path / "copy").content == content
    other, _ = write_shards([[20], [10]], name="other")
    assert Shard(other).content != content


def test_a_foreign_manifest_is_left_alone(write_shards, tmp_path: Path) -> None:
    prefix, _ = write_shards([[10]])
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    assert Shard(prefix).manifest is None
