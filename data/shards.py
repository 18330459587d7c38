"""Shards: PREFIX.bin and PREFIX.idx in Megatron's format, read as one stream of tokens.

The .idx is a 9-byte magic, then little-endian: version (u64, 1), dtype code (u8), sequences S (u64),
documents + 1 (u64), int32 lengths[S], int64 byte offsets[S], int64 documents[documents + 1] (the first
sequence of each, and S), and in multimodal corpora int8 modes[S]. A document is one or more sequences;
an empty one repeats an entry. So a document's end is a fact of the index, never of a token.
"""

import hashlib
import struct
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .manifest import manifest_of

__all__ = ["Shard", "megatron_indexed_dataset"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
PROBE_BYTES = 2**16


class Layout(NamedTuple):
    """What the header of an .idx says."""

    dtype: np.dtype
    sequences: int
    documents: int


class Shard:
    """The tokens of PREFIX.bin as one stream, with the documents' starts from PREFIX.idx.

    Opening reads a few hundred bytes; the files are mapped at the first read, and every read costs
    O(log documents) and the tokens asked for. No array it returns refers to the mapping.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        UserError: a missing file, another format, or sizes that do not fit together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin, self.idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise UserError(f"{path}: no such file; shards are named by their path without .bin and .idx")
        self.layout = _check_layout(self.bin, self.idx)
        self.num_tokens = self.bin.stat().st_size // self.layout.dtype.itemsize
        self.manifest = manifest_of(prefix)
        self._check_manifest()

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``start … start + length - 1`` of the stream.

        Returns:
            tokens: int64 (length,).
            starts: bool (length,), true where a token is the first of its document.
        """
        if start < 0 or length < 1 or start + length > self.num_tokens:
            raise IndexError(
                f"tokens {start} … {start + length - 1} of {self.prefix}, which has {self.num_tokens}"
            )
        itemsize = self.layout.dtype.itemsize
        view = self._dataset.bin_reader.read(self.layout.dtype.type, length, start * itemsize)
        tokens = view.astype(np.int64)
        # The index's arrays are not aligned, so numpy's searchsorted would copy them whole; bisect
        # touches log n entries.
        documents = range(self.num_documents)
        first = bisect_left(documents, start, key=self.document_start)
        last = bisect_left(documents, start + length, lo=first, key=self.document_start)
        starts = np.zeros(length, dtype=bool)
        sequences = self._dataset.document_indices[first:last]
        starts[self._dataset.index.sequence_pointers[sequences] // itemsize - start] = True
        return tokens, starts

    @property
    def num_documents(self) -> int:
        return self.layout.documents

    def document_start(self, document: int) -> int:
        """Where document 0 … num_documents begins in the stream; the last value is num_tokens."""
        sequence = int(self._dataset.document_indices[document])
        if sequence == self.layout.sequences:
            return self.num_tokens
        return int(self._dataset.index.sequence_pointers[sequence]) // self.layout.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds a token of the stream."""
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_lengths(self, step: int = 2**20) -> Iterator[np.ndarray]:
        """Tokens of every document, int64, some documents at a time."""
        itemsize = self.layout.dtype.itemsize
        for start in range(0, self.num_documents, step):
            sequences = self._dataset.document_indices[start : min(start + step, self.num_documents) + 1]
            ends = np.full(len(sequences), self.num_tokens, dtype=np.int64)
            inside = sequences < self.layout.sequences
            ends[inside] = self._dataset.index.sequence_pointers[sequences[inside]] // itemsize
            yield np.diff(ends)

    @cached_property
    def content(self) -> str:
        """A fingerprint of what the files hold, wherever they lie: their sizes and 64 KiB from three
        places of each, so that it costs the same for a petabyte. Another shuffle shows in it."""
        digest = hashlib.sha256()
        for path in (self.bin, self.idx):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as file:
                for place in (0, size // 2, max(0, size - PROBE_BYTES)):
                    file.seek(place)
                    digest.update(file.read(PROBE_BYTES))
        return digest.hexdigest()

    @cached_property
    def _dataset(self) -> Any:
        return megatron_indexed_dataset().IndexedDataset(self.prefix, mmap=True)

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        split = self.manifest.splits[Path(self.prefix).name]
        for path, record in ((self.bin, split.bin), (self.idx, split.idx)):
            if path.stat().st_size != record.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, its manifest says {record.bytes}; "
                    "rebuild the corpus or copy it again"
                )


def megatron_indexed_dataset() -> ModuleType:
    """Megatron's module of indexed datasets; 3 s of imports, hence only when it is needed."""
    with warnings.catch_warnings():
        # On import it warns of GPU libraries that reading files has no use for.
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _check_layout(bin_path: Path, idx_path: Path) -> Layout:
    """Header, sizes, and the first and last entries against each other: O(1)."""
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise UserError(f"{idx_path}: begins with {header[:9]!r}, not {MAGIC!r}; not a Megatron index")
        if len(header) < HEADER.size:
            raise UserError(f"{idx_path}: {size} bytes, the header alone takes {HEADER.size}; it is cut off")
        _, version, code, sequences, entries = HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{idx_path}: version {version} of the index format; only version 1 can be read")
        if code not in DTYPES:
            raise UserError(
                f"{idx_path}: dtype code {code} is none of integers; tokens cannot be read from it"
            )
        plain = HEADER.size + 12 * sequences + 8 * entries
        if size not in (plain, plain + sequences):
            raise UserError(
                f"{idx_path}: {size} bytes, but {sequences} sequences in {entries - 1} documents take "
                f"{plain}; it is cut off or damaged"
            )
        if not sequences or entries < 2:
            raise UserError(f"{idx_path}: an index of no documents; build the shards from some text")
        length = _number(file, HEADER.size + 4 * (sequences - 1), "<i")
        first = _number(file, HEADER.size + 4 * sequences, "<q")
        last = _number(file, HEADER.size + 12 * sequences - 8, "<q")
        begin = _number(file, HEADER.size + 12 * sequences, "<q")
        end = _number(file, plain - 8, "<q")
    dtype = np.dtype(DTYPES[code])
    if first != 0 or begin != 0 or end != sequences:
        raise UserError(f"{idx_path}: its documents do not span its {sequences} sequences; it is damaged")
    expected = last + length * dtype.itemsize
    found = bin_path.stat().st_size
    if found != expected:
        raise UserError(
            f"{bin_path}: {found} bytes, but {idx_path} describes {expected}; one of them is cut off"
        )
    if not found:
        raise UserError(f"{bin_path}: holds no tokens; build the shards from some text")
    return Layout(dtype, sequences, entries - 1)


def _number(file: Any, offset: int, form: str) -> int:
    file.seek(offset)
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
