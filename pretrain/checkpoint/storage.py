"""The storage under torch.distributed.checkpoint (DCP): one file of raw tensor bytes a rank, and JSON.

DCP plans: who writes which chunk, which replica is left out, which chunks a new layout needs. Here
the planned chunks become bytes and come back: `RankFileWriter` appends them to `rank-00000.bin`
(little-endian, row-major, each at a multiple of 64 bytes), `RankFileReader` reads the ones asked
for. `metadata.json` says where each lies (`index.py`). Nothing is pickled or unpickled.
"""

import dataclasses
import errno
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ...errors import UserError
from .files import FileRecord, HashingFile, read_back, write_file
from .index import (
    ALIGNMENT,
    DTYPES,
    INDEX_FILE,
    Chunk,
    StoredTensor,
    format_index,
    read_index,
)

__all__ = ["RankFileReader", "RankFileWriter", "planned_bytes"]

INDEX_ENTRY = 512
"""Bytes that `metadata.json` takes for a chunk, at most."""


@dataclass(frozen=True)
class _Place:
    """Where a rank put a chunk; travels to the coordinator."""

    file: FileRecord
    position: int
    length: int


class RankFileWriter(StorageWriter):
    """Writes into one folder that all ranks share; each rank reads back what it wrote.

    A subclass may prepare the folder in `prepare_global_plan` and complete it in `finish`: both run
    on the coordinator alone, before any rank writes and after all have.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: need not exist; must not hold a checkpoint.
        """
        _require_little_endian()
        self.folder = folder
        self.is_coordinator = False
        self.files: dict[str, FileRecord] = {}
        """All files of the checkpoint; known to the coordinator once `finish` has run."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(
                    f"checkpoint item {item.index.fqn!r} is no tensor, and nothing is pickled here"
                )
            if item.tensor_data is None or item.tensor_data.properties.dtype not in DTYPES.values():
                raise TypeError(
                    f"checkpoint item {item.index.fqn!r} has a dtype that is none of {list(DTYPES)}"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.bin") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Rank 0 has made it: on a machine whose disk went away nothing is to appear in the mount point.
        self.folder.mkdir(exist_ok=True)
        spans = []
        path = self.folder / plan.storage_data
        with HashingFile(path) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                file.pad(ALIGNMENT)
                position = file.size
                file.append(_bytes_of(tensor))
                spans.append((item.index, position, file.size - position))
            record = file.finish()
        read_back(path, record)
        return [
            WriteResult(index, length, _Place(record, position, length)) for index, position, length in spans
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for rank in results for result in rank}
        self.files = {place.file.name: place.file for place in places.values()}
        self._check_all_arrived()
        record = write_file(self.folder / INDEX_FILE, format_index(_index(metadata, places)))
        self.files[record.name] = record

    def _check_all_arrived(self) -> None:
        if not self.folder.is_dir():
            raise OSError(errno.ENOENT, f"{self.folder.name} was removed while it was written")
        for record in self.files.values():
            path = self.folder / record.name
            if not path.is_file() or path.stat().st_size != record.size:
                raise UserError(
                    f"{path}: written by its rank, but not seen by rank 0; run.dir must lie on a file "
                    "system that all ranks share"
                )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


class RankFileReader(StorageReader):
    """Reads the chunks that a plan asks for.

    Raises, here and while reading:
        UserError: `metadata.json` does not fit the files (see `read_index`), or one cannot be read.
    """

    def __init__(self, folder: Path, index: Mapping[str, StoredTensor] | None = None) -> None:
        """
        Args:
            folder: of a complete checkpoint.
            index: its checked metadata, where the caller has read it already.
        """
        _require_little_endian()
        self.folder = folder
        self._index = read_index(folder) if index is None else index
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
            self._index = read_index(self.folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, places = {}, {}
        for name, tensor in self._index.items():
            chunks = []
            for chunk in tensor.chunks:
                offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
                places[MetadataIndex(name, offsets)] = chunk
            properties = TensorProperties(dtype=tensor.dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._places: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._places[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            path = self.folder / name
            try:
                with FileIO(path) as stream:
                    # In the order of the file, so that the disk reads ahead.
                    for item in sorted(items, key=lambda i: self._places[i.storage_index].position):
                        self._read_item(stream, item, planner)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; use another checkpoint") from None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, stream: FileIO, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type != LoadItemType.TENSOR:
            raise TypeError(f"{item.dest_index.fqn!r} is no tensor")
        target = planner.resolve_tensor(item).detach()
        dtype = self._index[item.storage_index.fqn].dtype
        if target.dtype != dtype:
            raise TypeError(f"{item.dest_index.fqn!r} is stored as {dtype} and asked for as {target.dtype}")
        if target.numel():
            chunk = self._places[item.storage_index]
            self._read_box(stream, chunk, tuple(item.storage_offsets), tuple(item.lengths), target)
        planner.commit_tensor(item, target)

    def _read_box(
        self, stream: FileIO, chunk: Chunk, offsets: tuple[int, ...], lengths: tuple[int, ...], target: Tensor
    ) -> None:
        """Fill `target` with the box at `offsets` of extent `lengths` inside the chunk.

        Read is the span from the box's first element to its last: exactly the box where it is a range
        of rows, at most the chunk where it cuts through rows.
        """
        strides = _row_major_strides(chunk.sizes)
        first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        last = first + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
        count = last - first + 1
        itemsize = target.dtype.itemsize
        stream.seek(chunk.position + first * itemsize)
        if count == math.prod(lengths) and target.device.type == "cpu" and target.is_contiguous():
            _read_fully(stream, _bytes_of(target))
            return
        if self._scratch.numel() < count * itemsize:
            self._scratch = torch.empty(count * itemsize, dtype=torch.uint8)
        span = self._scratch[: count * itemsize]
        _read_fully(stream, _bytes_of(span))
        target.copy_(span.view(target.dtype).as_strided(lengths, strides))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


def planned_bytes(plans: Sequence[SavePlan]) -> int:
    """What all ranks together are about to write, with what the index says of it; a little too much."""
    total = 0
    for plan in plans:
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            total += data.chunk.sizes.numel() * data.properties.dtype.itemsize + ALIGNMENT
            total += len(item.index.fqn) + INDEX_ENTRY
    return total


def _index(metadata: Metadata, places: Mapping[MetadataIndex, _Place]) -> dict[str, StoredTensor]:
    index = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.file.name, place.position, place.length)
            )
        index[name] = StoredTensor(tuple(tensor.size), tensor.properties.dtype, tuple(chunks))
    return index


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; those of the tensor itself where it is contiguous on the CPU."""
    dense = tensor.detach().resolve_neg().cpu().contiguous()
    # Not reshape(-1): dims of size 1 may keep any stride, and bytes can be seen at stride 1 only.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_fully(stream: FileIO, into: memoryview) -> None:
    while len(into):
        count = stream.readinto(into)
        if not count:
            raise UserError(f"{stream.name}: ended too early; use another checkpoint")
        into = into[count:]


def _row_major_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise UserError("checkpoints hold little-endian bytes, and this machine is big-endian; use another")
