"""Small files of text that nobody vouches for: read whole, but only where that ends soon and fits."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

__all__ = ["parse_json", "read_plain"]

PIECE = 1 << 20


def read_plain(path: Path, *, most: int, follow: bool = True) -> bytes:
    """The bytes of a regular file of text.

    Args:
        most: bytes that it may have.
        follow: a link to such a file will do.

    Raises:
        OSError: it cannot be read, is larger, or is a pipe, a device or another thing that might never end.
        ValueError: a byte in it is 0, as all are in a file of many gigabytes that takes no room on its disk.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link, and no regular file") from None
        raise
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
            raise OSError(number, "no regular file")
        pieces, size = [], 0
        while piece := file.read(PIECE):
            size += len(piece)
            if max(size, status.st_size) > most:
                raise OSError(errno.EFBIG, f"larger than {most:,} bytes, which no such file is")
            if b"\0" in piece:
                raise ValueError("it holds a byte 0")
            pieces.append(piece)
    return b"".join(pieces)


def parse_json(text: bytes) -> Any:
    """
    Raises:
        ValueError: not JSON, or nested deeper than Python counts.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
