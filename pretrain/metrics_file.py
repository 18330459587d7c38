"""`metrics.jsonl` as it is read: which of its lines count, all of them or the last few.

A run that died writes the steps since its last checkpoint again, and may since have got less far than
the life before. So a line supersedes all lines before it that are of its step or of a later one; taken up
at a step, a run writes the line of that one again.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

__all__ = ["parse_line", "read_metrics", "walk_back"]

BLOCK = 1 << 16

STEP = re.compile(rb'\{"step": (\d{1,18})\b.*\}\s*')
"""A whole line, as `callbacks/metrics.py` writes it."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a step each, in order.

    A line that was cut off by a death is passed over.

    Raises:
        UserError: no such file, one that cannot be read, or nothing in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no metrics are here; name the folder of a run that has begun")
    records: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                record = parse_line(line)
                if record is not None:
                    while records and records[-1]["step"] >= record["step"]:
                        records.pop()
                    records.append(record)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; mend the permissions, or name another run") from None
    if not records:
        raise UserError(f"{path}: holds no step yet; wait for the first, or name another run")
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """What a line says of its step; None where it is none, or cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def walk_back(path: Path, reach: int) -> Iterator[tuple[int, bytes]]:
    """The steps that count, newest first, each with its line, which is not parsed.

    Args:
        reach: bytes, from the file's end, that are looked at.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        newer: int | None = None
        for line in _lines_back(file, reach):
            found = STEP.fullmatch(line)
            if found and (newer is None or int(found[1]) < newer):
                newer = int(found[1])
                yield newer, line


def _lines_back(file: BinaryIO, reach: int) -> Iterator[bytes]:
    position = file.seek(0, os.SEEK_END)
    end, rest = max(0, position - reach), b""
    while position > end:
        size = min(BLOCK, position - end)
        position -= size
        file.seek(position)
        lines = (file.read(size) + rest).split(b"\n")
        yield from reversed(lines[1:])
        rest = lines[0]
    if position == 0:
        yield rest
