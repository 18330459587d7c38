"""The files under a checkpoint: bytes where the index says, and no trust in what an index says."""

import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from plait.errors import UserError
from plait.pretrain.checkpoint import Checkpoint, Checkpoints
from plait.pretrain.checkpoint.index import Chunk, StoredTensor, format_index, read_index
from plait.pretrain.checkpoint.storage import RankFileReader, RankFileWriter

TENSORS = {"a": torch.arange(12, dtype=torch.float32).reshape(3, 4), "b": torch.arange(5)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Checkpoints(tmp_path).save(1, TENSORS, {})
    return tmp_path / "step-00000001"


def test_the_bytes_lie_where_the_index_says(saved: Path) -> None:
    index = json.loads((saved / "metadata.json").read_text())
    data = (saved / "rank-00000.bin").read_bytes()
    for name, tensor in TENSORS.items():
        (chunk,) = index["tensors"][name]["chunks"]
        assert chunk["position"] % 64 == 0
        array = tensor.numpy()
        stored = data[chunk["position"] : chunk["position"] + chunk["length"]]
        assert stored == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught, pytest.warns(UserWarning, match="single process"):
        dcp.save({"a": torch.zeros(1), "step": 3}, storage_writer=RankFileWriter(tmp_path), no_dist=True)
    error, _ = caught.value.failures[0]
    assert isinstance(error, TypeError)
    assert str(error) == "checkpoint item 'step' is no tensor, and nothing is pickled here"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_ranks_do_not_share_is_one_line(tmp_path: Path) -> None:
    class WithoutSharing(RankFileWriter):
        def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
            (self.folder / "rank-00000.bin").unlink()
            super().finish(metadata, results)

    with pytest.raises(CheckpointException) as caught, pytest.warns(UserWarning, match="single process"):
        dcp.save(dict(TENSORS), storage_writer=WithoutSharing(tmp_path), no_dist=True)
    error, _ = caught.value.failures[0]
    assert isinstance(error, UserError)
    assert "rank-00000.bin: written by its rank, but not seen by rank 0" in str(error)


def test_stored_chunks_of_any_cut_fill_targets_of_any_cut(tmp_path: Path) -> None:
    """(4, 6) cut into grids of up to 2 by 3 boxes, written by hand, read into rows and into columns."""
    whole = torch.randn(4, 6, dtype=torch.float64)
    for case, (rows, columns) in enumerate(itertools.product([[0, 4], [0, 1, 4]], [[0, 6], [0, 2, 3, 6]])):
        folder = tmp_path / str(case)
        folder.mkdir()
        data, chunks = bytearray(), []
        for (top, bottom), (left, right) in itertools.product(
            itertools.pairwise(rows), itertools.pairwise(columns)
        ):
            box = whole[top:bottom, left:right].contiguous()
            data += bytes(-len(data) % 64)
            sizes, place = (bottom - top, right - left), (len(data), box.numel() * 8)
            chunks.append(Chunk((top, left), sizes, "rank-00000.bin", *place))
            data += box.numpy().tobytes()
        (folder / "rank-00000.bin").write_bytes(data)
        index = {"w": StoredTensor((4, 6), torch.float64, tuple(chunks))}
        (folder / "metadata.json").write_text(format_index(index))
        assert read_index(folder) == index
        for target in (torch.zeros(4, 6).double(), torch.zeros(6, 4).double().t()):
            Checkpoint(folder, 1).load_into({"w": target})
            assert torch.equal(target, whole)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda tree: change(tree["tensors"]["a"])


def chunk(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return edit(lambda entry: entry["chunks"][0].update(fields))


def split(*boxes: tuple[list[int], list[int]]) -> Callable[[dict[str, Any]], object]:
    """Chunks of `a`, each of which says it starts at byte 0."""

    def change(entry: dict[str, Any]) -> None:
        first = entry["chunks"][0]
        entry["chunks"] = [
            first | {"offsets": offsets, "sizes": sizes, "length": sizes[0] * sizes[1] * 4}
            for offsets, sizes in boxes
        ]

    return edit(change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (chunk(file="../step-00000001/rank-00000.bin"), "'../step-00000001/rank-00000.bin' is no name"),
        (chunk(file="/etc/passwd"), "'/etc/passwd' is no name"),
        (chunk(file="rank-00000.bin/"), "is no name"),
        (chunk(file="rank-00000.bin\n"), "is no name"),
        (chunk(file="rank-00001.bin"), "rank-00001.bin: No such file"),
        (chunk(file=7), "file = 7 is no str"),
        (chunk(position=64), "bytes 64 to 112 reach beyond the end of rank-00000.bin"),
        (chunk(position=2**80), "reach beyond the end"),
        (chunk(position=-64), "position = -64"),
        (chunk(position=4), "position = 4 is no multiple of 64"),
        (chunk(position=True), "position = True is no int"),
        (chunk(position="0"), "position = '0' is no int"),
        (chunk(length=48.5), "length = 48.5 is no int"),
        (chunk(length=2**62), "length = 4611686018427387904 is not that of"),
        (chunk(length=44), "length = 44 is not that of"),
        (chunk(offsets=[0]), "do not fit the shape"),
        (chunk(offsets=[1, 0]), "reach beyond the shape"),
        (chunk(offsets=[-1, 0]), r"offsets = \[-1, 0\] are no sizes"),
        (chunk(sizes=[2, 4], length=32), "do not cover the shape"),
        (chunk(sizes="34"), "sizes = '34' is no list"),
        (split(([0, 0], [2, 4]), ([1, 0], [1, 4])), "overlaps another"),
        (split(([0, 0], [3, 2]), ([0, 1], [3, 2])), "overlaps another"),
        (split(([0, 0], [3, 2]), ([0, 0], [3, 2])), "same offsets"),
        (split(([0, 0], [3, 2]), ([0, 2], [3, 2])), "two chunks share byte 0"),
        (edit(lambda e: e.update(chunks=[])), "do not cover the shape"),
        (edit(lambda e: e.update(chunks=[3])), "offsets = None is no list"),
        (edit(lambda e: e.update(dtype="object")), "dtype = 'object' is none of"),
        (edit(lambda e: e.update(dtype="float64")), "length = 48 is not that of"),
        (edit(lambda e: e.update(shape=[2**70, 0])), "are no sizes"),
        (edit(lambda e: e.update(shape=[2**60, 2**60])), "do not cover the shape"),
        (lambda tree: tree["tensors"].update(a=None), "dtype = None is no str"),
        (lambda tree: tree.update(tensors=[]), r"tensors = \[\] is no dict"),
        (lambda tree: tree.update(format=2), "format = 2, and this plait reads format 1"),
        (lambda tree: tree.update(byte_order="big"), "byte_order = 'big'"),
    ],
)
def test_a_hostile_index_is_one_line(
    saved: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = saved / "metadata.json"
    tree = json.loads(path.read_text())
    changed = copy.deepcopy(tree)
    change(changed)
    assert changed != tree
    path.write_text(json.dumps(changed))
    target = {name: torch.full_like(tensor, 99) for name, tensor in TENSORS.items()}
    with pytest.raises(UserError, match=says) as caught:
        Checkpoint(saved, 1).load_into(target)
    assert str(caught.value).startswith(f"{path}: ")
    assert all((tensor == 99).all() for tensor in target.values())


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", '{"format": ' + "9" * 5000 + "}", "\ud800"])
def test_what_is_no_index_is_one_line(saved: Path, text: str) -> None:
    (saved / "metadata.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=r"metadata.json: .*use another checkpoint"):
        read_index(saved)


def test_links_and_folders_are_no_tensor_files(saved: Path, tmp_path: Path) -> None:
    file = saved / "rank-00000.bin"
    os.rename(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"rank-00000\.bin is no regular file"):
        read_index(saved)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"rank-00000\.bin is no regular file"):
        read_index(saved)


def test_a_file_that_shrinks_after_the_check_is_one_line(saved: Path) -> None:
    reader = RankFileReader(saved)
    os.truncate(saved / "rank-00000.bin", 20)
    target = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with pytest.raises(CheckpointException) as caught, pytest.warns(UserWarning, match="single process"):
        dcp.load(target, storage_reader=reader, no_dist=True)
    error, _ = caught.value.failures[0]
    assert str(error) == f"{saved / 'rank-00000.bin'}: ended too early; use another checkpoint"
