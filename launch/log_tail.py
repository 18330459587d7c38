"""The end of a log, and what is added to it."""

import os
import time
from contextlib import suppress
from pathlib import Path

import typer

from ..errors import UserError

__all__ = ["follow_file", "print_tail"]

BYTES_A_LINE = 512
"""More than a log's line has, as a rule."""

INTERVAL = 0.5
"""Seconds between two looks."""


def print_tail(file: Path, lines: int) -> int:
    """Print the last lines of a file; returns the place up to which it was read, 0 where it is not there yet.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - lines * BYTES_A_LINE))
            text = log.read(size - log.tell())
    except FileNotFoundError:
        typer.echo(f"{file} is not written yet", err=True)
        return 0
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    for line in text.decode(errors="replace").splitlines()[-lines:]:
        typer.echo(line)
    return size


def follow_file(file: Path, place: int) -> None:
    """Print what is added to a file beyond a place, until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        while True:
            with suppress(FileNotFoundError), file.open("rb") as log:
                # A shorter file is another one.
                place = place if log.seek(0, os.SEEK_END) >= place else 0
                log.seek(place)
                text = log.read()
                place += len(text)
                typer.echo(text.decode(errors="replace"), nl=False)
            time.sleep(INTERVAL)
