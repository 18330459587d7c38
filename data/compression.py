"""Files opened for reading as bytes, uncompressed on the way, and never silently short."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from ..errors import UserError

__all__ = ["COMPRESSED_SUFFIXES", "open_bytes", "plain_suffix"]

BUFFER_BYTES = 2**17
# Zstd packs a run of one byte 30 000 times smaller, so what is read at once bounds what comes out.
ZSTD_READ_BYTES = 2**12


class _ZstdFile(io.RawIOBase):
    """The bytes of all frames of a .zst file.

    The library's own reader takes a file that ends inside a frame for one that ends there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(ZSTD_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(_ZstdFile(path), BUFFER_BYTES)


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
COMPRESSED_SUFFIXES = tuple(OPENERS)


def plain_suffix(path: Path) -> str:
    """The suffix, in lower case, of what the file holds once uncompressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed by its suffix.

    Raises:
        UserError: from the whole ``with`` block, where the file cannot be read to its end.
    """
    opener = OPENERS.get(path.suffix.lower(), _open_plain)
    try:
        with opener(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read: {error}; is it whole?") from None
