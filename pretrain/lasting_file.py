"""A file that grows by lines while its folder may go away and come back."""

import errno
import io
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["LastingFile"]

logger = logging.getLogger(__name__)

MOST_WAITING = 100_000
"""Lines that are kept for a folder to come back."""


class LastingFile:
    """Appends lines. Where the disk refuses, they wait; a warning says so once, and the next line tries anew.

    Args:
        path: of the file; a line of it that was cut off by a death is closed.
        absence: why the file's folder is not the one it should be; None where it is. Asked before anything
            is opened, so that nothing is written into the mount point of a disk that went away.

    Raises:
        OSError: it cannot be opened at first.
    """

    def __init__(self, path: Path, absence: Callable[[], str | None] = lambda: None) -> None:
        self.path, self._absence = path, absence
        self._waiting: list[str] = []
        self._lost = 0
        self._stream: io.FileIO | None = None
        self._told = False
        self._open()

    def append(self, line: str) -> None:
        """Write a line, its end not included, or keep it for later."""
        self._waiting.append(line)
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[0]
            self._lost += 1
        self._write()

    def close(self) -> None:
        """Write what waits, if that can be, and close the file."""
        if self._waiting:
            self._write()
        if self._waiting:
            logger.warning("%s: %d lines are not written", self.path, len(self._waiting) + self._lost)
        self._drop()

    def _write(self) -> None:
        try:
            if not self._is_open():
                self._drop()
                self._open()
            while self._waiting:
                # A line by a call: what a full disk takes of one is cut away again.
                self._write_line(self._waiting[0] + "\n")
                del self._waiting[0]
        except OSError as error:
            self._drop()
            if not self._told:
                self._told = True
                reason = error.strerror or error
                logger.warning("%s: cannot be written: %s; its lines wait for better days", self.path, reason)
            return
        if self._told:
            self._told = False
            lost = f", without {self._lost} lines" if self._lost else ""
            logger.warning("%s: is written again%s", self.path, lost)
            self._lost = 0

    def _write_line(self, line: str) -> None:
        assert self._stream is not None
        data = line.encode()
        size = os.fstat(self._stream.fileno()).st_size
        try:
            written = self._stream.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._stream.truncate(size)
            raise

    def _is_open(self) -> bool:
        """Whether what is open is still the file of that path; one that was moved away is let go."""
        if self._stream is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        if (reason := self._absence()) is not None:
            raise OSError(errno.ENOENT, reason)
        self._stream = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        size = self._stream.seek(0, os.SEEK_END)
        if size:
            self._stream.seek(size - 1)
            if self._stream.read(1) != b"\n":
                self._stream.write(b"\n")

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except OSError:
                logger.debug("%s: closing failed", self.path, exc_info=True)
