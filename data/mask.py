"""Masks: PREFIX.mask beside PREFIX.bin says which tokens count as targets, a bit each.

Little-endian: the magic b"PLAITMSK", version (u64, 1), number of tokens (u64), then ceil(tokens / 8)
bytes; token i is bit i % 8 of byte i // 8, 1 where it counts. Bits past the last token are 0.
"""

import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..errors import UserError

__all__ = ["MaskWriter", "check_mask", "map_mask", "read_bits"]

HEADER = struct.Struct("<8sQQ")
MAGIC = b"PLAITMSK"
VERSION = 1


class MaskWriter:
    """Writes a mask piece by piece; the header comes last, so that a file cut off is told.

    Attributes:
        tokens: how many were written.
        counted: how many of them count.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(HEADER.size))
        self._rest = np.zeros(0, dtype=bool)
        self.tokens = self.counted = 0

    def append(self, counts: np.ndarray) -> None:
        """Add the bits of the next tokens, bool (tokens,)."""
        self.tokens += len(counts)
        self.counted += int(counts.sum())
        bits = np.concatenate([self._rest, counts])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is None:
                file.write(np.packbits(self._rest, bitorder="little").tobytes())
                file.seek(0)
                file.write(HEADER.pack(MAGIC, VERSION, self.tokens))


def check_mask(path: Path, tokens: int) -> None:
    """Look whether a mask is one and has a bit for each of a shard's tokens: O(1).

    Raises:
        UserError: it is another file, cut off, or of other shards.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: begins with {header[:8]!r}, not {MAGIC!r}; not a mask, or one cut off")
    _, version, found = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the mask format; only version {VERSION} can be read")
    if found != tokens:
        raise UserError(
            f"{path}: masks {found} tokens, but its shard holds {tokens}; rebuild the corpus or remove it"
        )
    if size != (expected := HEADER.size + (tokens + 7) // 8):
        raise UserError(f"{path}: {size} bytes, but {tokens} tokens take {expected}; it is cut off")


def map_mask(path: Path) -> np.ndarray:
    """The bytes that hold the bits, mapped: uint8 (ceil(tokens / 8),)."""
    return np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)


def read_bits(mask: np.ndarray, start: int, length: int) -> np.ndarray:
    """Which of the tokens ``start … start + length - 1`` count: bool (length,)."""
    first = start // 8
    packed = np.array(mask[first : (start + length + 7) // 8])
    bits = np.unpackbits(packed, bitorder="little")
    return bits[start - 8 * first :][:length].astype(bool)
