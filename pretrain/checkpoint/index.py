"""`metadata.json`: which tensors a checkpoint holds, and at which bytes of which file each part lies.

    {"format": 1, "byte_order": "little", "tensors": {
    "model.norm.weight": {"dtype": "float32", "shape": [64], "chunks": [
      {"offsets": [0], "sizes": [64], "file": "rank-00000.bin", "position": 0, "length": 256}]}
    }}

A tensor's chunks tile it: each is a box at `offsets` of extent `sizes`, stored row-major from byte
`position` on. What is read is believed only after it was held against the files that are there.
"""

import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...data.plain_file import parse_json, read_plain
from ...errors import UserError

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "INDEX_FILE",
    "Chunk",
    "StoredTensor",
    "describe",
    "format_index",
    "read_index",
]

INDEX_FILE = "metadata.json"
RANK_FILE = re.compile(r"rank-[0-9]{5,9}\.bin", re.ASCII)
ALIGNMENT = 64
"""Bytes; every chunk starts at a multiple of it, so that files can be mapped as arrays of any dtype."""
FORMAT = 1
MOST_ENTRY = 1024
"""Bytes of the index that a chunk of a tensor takes, with a long name."""
MOST_DIMS, MOST_CUT_DIMS = 8, 4
MOST_CORNERS = 1 << 22
"""Of all chunks of a tensor, counting the dims that are cut: those of two million parts along one."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
REMEDY = "it is damaged or was not written by plait; use another checkpoint"

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    """First byte in the file, a multiple of `ALIGNMENT`."""
    length: int
    """Bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint: its global shape and the chunks that tile it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def describe(tensor: StoredTensor | torch.Tensor) -> str:
    """Its shape and dtype, for a line of text."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def format_index(tensors: Mapping[str, StoredTensor]) -> str:
    """The text of `metadata.json`, one tensor a line."""
    lines = []
    for name, tensor in tensors.items():
        entry = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": tensor.shape,
            "chunks": [vars(chunk) for chunk in tensor.chunks],
        }
        lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    opening = f'{{"format": {FORMAT}, "byte_order": "little", "tensors": {{\n'
    return opening + ",\n".join(lines) + "\n}}\n"


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Read `metadata.json` and hold it against the files beside it.

    Raises:
        UserError: it is missing, is no JSON of this form, names a file outside the folder or bytes
            beyond a file's end, or its chunks do not tile their tensor.
    """
    path = folder / INDEX_FILE
    try:
        tree = parse_json(read_plain(path, most=_most_bytes(folder), follow=False))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; {REMEDY}") from None
    try:
        return _parse(tree, _file_size(folder))
    except ValueError as error:
        raise UserError(f"{path}: {error}; {REMEDY}") from None


def _most_bytes(folder: Path) -> int:
    """What the index can take: an entry for every `ALIGNMENT` bytes of the others, and empty ones."""
    total = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))
    return (64 << 20) + total // ALIGNMENT * MOST_ENTRY


def _parse(tree: Any, file_size: Callable[[str], int]) -> dict[str, StoredTensor]:
    if _field(tree, "format", int) != FORMAT:
        raise ValueError(f"format = {tree['format']}, and this plait reads format {FORMAT}")
    if _field(tree, "byte_order", str) != "little":
        raise ValueError(f"byte_order = {tree['byte_order']!r}, and this plait reads 'little'")
    tensors = {}
    for name, entry in _field(tree, "tensors", dict).items():
        try:
            tensors[name] = _tensor(entry, file_size)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
    _check_no_shared_bytes(tensors)
    return tensors


def _tensor(entry: Any, file_size: Callable[[str], int]) -> StoredTensor:
    name = _field(entry, "dtype", str)
    if name not in DTYPES:
        raise ValueError(f"dtype = {name[:40]!r} is none of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    shape = _sizes(entry, "shape")
    chunks = []
    for i, chunk in enumerate(_field(entry, "chunks", list)):
        try:
            chunks.append(_chunk(chunk, shape, dtype, file_size))
        except ValueError as error:
            raise ValueError(f"chunk {i}: {error}") from None
    _check_tiling(shape, chunks)
    return StoredTensor(shape, dtype, tuple(chunks))


def _chunk(entry: Any, shape: tuple[int, ...], dtype: torch.dtype, file_size: Callable[[str], int]) -> Chunk:
    offsets, sizes = _sizes(entry, "offsets"), _sizes(entry, "sizes")
    file = _field(entry, "file", str)
    position, length = _field(entry, "position", int), _field(entry, "length", int)
    if not len(offsets) == len(sizes) == len(shape):
        raise ValueError(f"offsets {offsets} and sizes {sizes} do not fit the shape {shape}")
    if any(offset + size > end for offset, size, end in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"offsets {offsets} and sizes {sizes} reach beyond the shape {shape}")
    if length != math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"length = {length} is not that of {sizes} in {dtype}")
    if not RANK_FILE.fullmatch(file):
        raise ValueError(f"file = {file[:80]!r} is no name such as rank-00000.bin")
    if position < 0 or position % ALIGNMENT:
        raise ValueError(f"position = {position} is no multiple of {ALIGNMENT}")
    if position + length > file_size(file):
        raise ValueError(f"bytes {position} to {position + length} reach beyond the end of {file}")
    return Chunk(offsets, sizes, file, position, length)


def _check_tiling(shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks within the shape that do not overlap and have its volume cover every element once."""
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or not chunks:
        raise ValueError(f"its chunks do not cover the shape {shape}")
    if len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise ValueError("two chunks have the same offsets")
    boxes = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if len(boxes) < 2:
        return
    dims = [d for d in range(len(shape)) if any(box.sizes[d] != shape[d] for box in boxes)]
    if len(dims) > MOST_CUT_DIMS or len(boxes) << len(dims) > MOST_CORNERS:
        raise ValueError(f"{len(boxes)} chunks, cut along {len(dims)} dims: more than can be checked")
    # How often each point is covered is the sum, over corners before it, of their signs. So boxes tile the
    # whole where all corners cancel out but those of the whole; no two boxes need be compared.
    corners: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        sides = [((box.offsets[d], 1), (box.offsets[d] + box.sizes[d], -1)) for d in dims]
        for corner in itertools.product(*sides):
            corners[tuple(place for place, _ in corner)] += math.prod(sign for _, sign in corner)
    for place, count in corners.items():
        outer = all(place[i] in (0, shape[d]) for i, d in enumerate(dims))
        if bool(count) != outer:
            raise ValueError(f"a chunk overlaps another, at {place} along the dims {dims}")


def _check_no_shared_bytes(tensors: Mapping[str, StoredTensor]) -> None:
    last_file, last_end = "", 0
    for chunk in sorted(_filled_chunks(tensors.values()), key=lambda c: (c.file, c.position)):
        if chunk.file == last_file and chunk.position < last_end:
            raise ValueError(f"two chunks share byte {chunk.position} of {chunk.file}")
        last_file, last_end = chunk.file, chunk.position + chunk.length


def _filled_chunks(tensors: Iterable[StoredTensor]) -> list[Chunk]:
    return [chunk for tensor in tensors for chunk in tensor.chunks if chunk.length]


def _file_size(folder: Path) -> Callable[[str], int]:
    """Sizes of the folder's regular files, each looked up once; a link could lead out of the folder."""
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            try:
                status = os.lstat(folder / name)
            except OSError as error:
                raise ValueError(f"{name}: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{name} is no regular file")
            sizes[name] = status.st_size
        return sizes[name]

    return size


def _field(entry: Any, key: str, kind: type[T]) -> T:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:  # bool is an int to isinstance
        raise ValueError(f"{key} = {repr(value)[:40]} is no {kind.__name__}")
    return value


def _sizes(entry: Any, key: str) -> tuple[int, ...]:
    values = _field(entry, key, list)
    if len(values) > MOST_DIMS:
        raise ValueError(f"{key} has {len(values)} dims; tensors here have at most {MOST_DIMS}")
    if any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise ValueError(f"{key} = {repr(values)[:80]} are no sizes")
    return tuple(values)
