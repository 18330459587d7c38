"""Shards: PREFIX.bin and PREFIX.idx in Megatron's format, read as one stream of tokens, PREFIX.mask.

The .idx is a 9-byte magic, then little-endian: version (u64, 1), dtype code (u8), sequences S (u64),
documents + 1 (u64), int32 lengths[S], int64 byte offsets[S], int64 documents[documents + 1] (the first
sequence of each, and S), and in multimodal corpora int8 modes[S]. A document is one or more sequences;
an empty one repeats an entry. So a document's end is a fact of the index, never of a token.
"""

import hashlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .manifest import manifest_of
from .mask import check_mask, map_mask, read_bits
from .megatron import indexed_dataset

__all__ = ["Shard"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
PROBE_BYTES = 2**12
# A mapped shard holds four file descriptors, and a process may often have no more than 1024.
MOST_OPEN = 128


class Layout(NamedTuple):
    """What the header of an .idx says."""

    dtype: np.dtype
    sequences: int
    documents: int


class Shard:
    """The tokens of PREFIX.bin as one stream, with the documents' starts from PREFIX.idx and, where it
    is there, the mask of PREFIX.mask.

    Opening reads a few hundred bytes; the files are mapped at the first read, and every read costs
    O(log documents) and the tokens asked for. No array it returns refers to the mapping.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Attributes:
        masked: whether a mask says which tokens count as targets.

    Raises:
        UserError: a missing file, another format, or sizes that do not fit together; reading raises it
            too, where the inside of an index is damaged.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin, self.idx, self.mask = (Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "mask"))
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise UserError(f"{path}: no such file; shards are named by their path without .bin and .idx")
        self.layout = _check_layout(self.bin, self.idx)
        self.num_tokens = self.bin.stat().st_size // self.layout.dtype.itemsize
        self.masked = self.mask.is_file()
        if self.masked:
            check_mask(self.mask, self.num_tokens)
        self.manifest = manifest_of(prefix)
        self._check_manifest()

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``start … start + length - 1`` of the stream.

        Returns:
            tokens: int64 (length,).
            starts: bool (length,), true where a token is the first of its document.
        """
        return self.tokens(start, length), self.starts(start, length)

    def starts(self, start: int, length: int) -> np.ndarray:
        """Which of the tokens ``start … start + length - 1`` are the first of their document, bool
        (length,); from the index alone."""
        self._check_inside(start, length)
        # The index's arrays are not aligned, so numpy's searchsorted would copy them whole; bisect
        # touches log n entries.
        documents = range(self.num_documents)
        first = bisect_left(documents, start, key=self.document_start)
        last = bisect_left(documents, start + length, lo=first, key=self.document_start)
        places = self._places(first, last) - start
        if len(places) and not 0 <= places.min() <= places.max() < length:
            raise self._damaged()
        starts = np.zeros(length, dtype=bool)
        starts[places] = True
        return starts

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start … start + length - 1`` of the stream, int64 (length,)."""
        self._check_inside(start, length)
        layout, files = self.layout, _open_files(self)
        view = files.dataset.bin_reader.read(layout.dtype.type, length, start * layout.dtype.itemsize)
        return view.astype(np.int64)

    def _check_inside(self, start: int, length: int) -> None:
        if start < 0 or length < 1 or start + length > self.num_tokens:
            raise IndexError(
                f"tokens {start} … {start + length - 1} of {self.prefix}, which has {self.num_tokens}"
            )

    def counted(self, start: int, length: int) -> np.ndarray:
        """Which of the tokens ``start … start + length - 1`` count as targets, bool (length,)."""
        mask = _open_files(self).mask
        return np.ones(length, dtype=bool) if mask is None else read_bits(mask, start, length)

    @property
    def num_documents(self) -> int:
        return self.layout.documents

    def document_start(self, document: int) -> int:
        """Where document 0 … num_documents begins in the stream; the last value is num_tokens."""
        # One number at a time, because a read looks up some forty of them.
        dataset = _open_files(self).dataset
        sequence = int(dataset.document_indices[document])
        if sequence == self.layout.sequences:
            return self.num_tokens
        if not 0 <= sequence < self.layout.sequences:
            raise self._damaged()
        place = int(dataset.index.sequence_pointers[sequence]) // self.layout.dtype.itemsize
        if not 0 <= place <= self.num_tokens:
            raise self._damaged()
        return place

    def document_at(self, token: int) -> int:
        """The document that holds a token of the stream."""
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_lengths(self, step: int = 2**20) -> Iterator[np.ndarray]:
        """Tokens of every document, int64, some documents at a time."""
        for start in range(0, self.num_documents, step):
            yield np.diff(self._places(start, min(start + step, self.num_documents) + 1))

    def _places(self, first: int, last: int) -> np.ndarray:
        """Where documents ``first … last - 1`` begin in the stream, int64; document num_documents is
        its end."""
        dataset, itemsize = _open_files(self).dataset, self.layout.dtype.itemsize
        sequences = np.array(dataset.document_indices[first:last])
        if len(sequences) and not 0 <= sequences.min() <= sequences.max() <= self.layout.sequences:
            raise self._damaged()
        places = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        inside = sequences < self.layout.sequences
        pointers = dataset.index.sequence_pointers[sequences[inside]]
        if len(pointers) and not 0 <= pointers.min() <= pointers.max() <= self.num_tokens * itemsize:
            raise self._damaged()
        places[inside] = pointers // itemsize
        return places

    def check_index(self, step: int = 2**20) -> None:
        """Compare every entry of the index with every other; reads all of it.

        Raises:
            UserError: sequences that do not follow one another, or documents that do not.
        """
        dataset, end = _open_files(self).dataset, 0
        for start in range(0, self.layout.sequences, step):
            lengths = dataset.index.sequence_lengths[start : start + step].astype(np.int64)
            ends = end + np.cumsum(lengths * self.layout.dtype.itemsize)
            pointers = dataset.index.sequence_pointers[start : start + step]
            if lengths.min() < 0 or pointers[0] != end or not np.array_equal(pointers[1:], ends[:-1]):
                raise self._damaged()
            end = int(ends[-1])
        if end != self.bin.stat().st_size:
            raise self._damaged()
        for start in range(0, self.layout.documents, step):
            if (np.diff(dataset.document_indices[start : start + step + 1]) < 0).any():
                raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(
            f"{self.idx}: its entries contradict one another; it is damaged, build the shards or copy them "
            "again"
        )

    @cached_property
    def content(self) -> str:
        """A fingerprint of what the files hold, wherever they lie: their sizes and 4 KiB from three
        places of each, so that it costs the same for a petabyte. Another shuffle shows in it."""
        digest = hashlib.sha256()
        for path in (self.bin, self.idx, self.mask)[: 3 if self.masked else 2]:
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as file:
                for place in (0, size // 2, max(0, size - PROBE_BYTES)):
                    file.seek(place)
                    digest.update(file.read(PROBE_BYTES))
        return digest.hexdigest()

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        split = self.manifest.splits[Path(self.prefix).name]
        if self.masked != (split.mask is not None):
            raise UserError(
                f"{self.mask}: {'is there' if self.masked else 'is missing'}, against its manifest; "
                "rebuild the corpus or copy it again"
            )
        for path, record in split.files(self.prefix).items():
            if path.stat().st_size != record.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, its manifest says {record.bytes}; "
                    "rebuild the corpus or copy it again"
                )


class Files(NamedTuple):
    """A shard's files, mapped."""

    dataset: Any
    mask: np.ndarray | None


@lru_cache(maxsize=MOST_OPEN)
def _open_files(shard: Shard) -> Files:
    dataset = indexed_dataset().IndexedDataset(shard.prefix, mmap=True)
    return Files(dataset, map_mask(shard.mask) if shard.masked else None)


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
