"""`run.log`: a run's life in lines that a person reads, one an event; without torch.

    2026-03-01 09:30:00+01:00  checkpoint saved: step 500, 1.23 GB in 4.5 s

Local time with its offset, two spaces, the event. Lines are only ever added.
"""

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

__all__ = ["FAILED", "RUN_LOG", "last_note", "note", "note_once"]

RUN_LOG = "run.log"

FAILED = "failed: "
"""Opens the event of an error."""

LONGEST = 4096
"""Bytes in which the last line is looked for."""


def note(folder: str | Path, event: str) -> None:
    """Add a line to a run's log; it is lost where the disk is full, or the folder is gone.

    Args:
        event: becomes one line, whatever it holds.
    """
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    text = "".join(c if c.isprintable() else "?" for c in " ".join(event.split()))
    line = f"{now}  {text}\n".encode(errors="backslashreplace")
    with suppress(OSError), (Path(folder) / RUN_LOG).open("ab+", buffering=0) as file:
        # A line that met a full disk was cut short.
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = b"\n" + line
        file.write(line)


def note_once(folder: str | Path, event: str) -> None:
    """Add a line that several ranks may know of, unless it is the last one already."""
    if last_note(folder) != event:
        note(folder, event)


def last_note(folder: str | Path) -> str | None:
    """The event of the last line; None where there is none."""
    with suppress(OSError), (Path(folder) / RUN_LOG).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST))
        lines = file.read().decode(errors="replace").splitlines()
        if lines and (event := lines[-1].partition("  ")[2]):
            return event
    return None
