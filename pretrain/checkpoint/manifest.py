"""`manifest.json`: the last file written into a checkpoint, by which a whole one is known.

It carries the trainer's facts, the size and checksum of every other file, and a checksum of itself.
"""

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ... import __version__
from ...data.plain_file import parse_json, read_plain
from ...errors import UserError
from .files import FileRecord, write_file

__all__ = [
    "MANIFEST_FILE",
    "Manifest",
    "check_size",
    "parse_manifest",
    "put_manifest",
    "read_manifest",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
FORMAT = 1
MOST_BYTES = 256 << 20
"""Of `manifest.json`: room for a plan of some hundred thousand shards."""
FILE = re.compile(r"metadata\.json|rank-[0-9]{5,9}\.bin", re.ASCII)


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint beside its tensors."""

    step: int
    serial: int
    """Counts the saves of a run. The newest checkpoint is the last one saved, which is not the one of
    the highest step where the run went back to an older step and trained on from there."""
    facts: dict[str, Any]
    """What the trainer gave: its cursor, schedule, fingerprints."""
    files: dict[str, FileRecord]
    versions: dict[str, str]
    """Of plait, torch and python, when it was saved."""
    saved: datetime
    """When it was written, in UTC."""


def write_manifest(
    folder: Path, step: int, serial: int, facts: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> None:
    """Write `manifest.json` of a folder that is complete otherwise.

    Args:
        facts: as JSON gives them back: string keys, lists instead of tuples, finite numbers.
    """
    import torch

    versions = {
        "plait": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    files = {record.name: record for record in files.values()}
    put_manifest(folder, Manifest(step, serial, dict(facts), files, versions, datetime.now(UTC)))


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with what it is to say."""
    files = manifest.files.values()
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "serial": manifest.serial,
        "saved": manifest.saved.isoformat(timespec="seconds"),
        "facts": manifest.facts,
        "files": {record.name: {"size": record.size, "sha256": record.sha256} for record in files},
        "versions": manifest.versions,
    }
    write_file(folder / MANIFEST_FILE, json.dumps(body | {"sha256": _checksum(body)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`, and check that the files it lists are there in full length.

    Raises:
        UserError: it is missing or damaged, or a file is missing or cut short.
    """
    manifest = parse_manifest(folder)
    for record in manifest.files.values():
        check_size(folder, record)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` and believe it.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        body = parse_json(read_plain(path, most=MOST_BYTES, follow=False))
        sound = isinstance(body, dict) and body.pop("sha256", None) == _checksum(body)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; use another checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; use another checkpoint") from None
    if not sound:
        raise UserError(f"{path}: damaged: its checksum does not fit; use another checkpoint")
    if body.get("format") != FORMAT:
        raise UserError(
            f"{path}: format = {body.get('format')}, and this plait ({__version__}) reads format {FORMAT}; "
            "use the plait that wrote it"
        )
    try:
        files = {
            name: FileRecord(name, int(entry["size"]), str(entry["sha256"]))
            for name, entry in body["files"].items()
        }
        return Manifest(
            int(body["step"]),
            int(body["serial"]),
            dict(body["facts"]),
            files,
            dict(body["versions"]),
            # Earlier manifests do not say when.
            datetime.fromisoformat(body["saved"]) if "saved" in body else _modified(path),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError):
        raise UserError(f"{path}: not a manifest that plait wrote; use another checkpoint") from None


def check_size(folder: Path, record: FileRecord) -> None:
    """
    Raises:
        UserError: the file is none of a checkpoint, missing, a link or the like, or of another length.
    """
    if not FILE.fullmatch(record.name):
        raise UserError(
            f"{folder / MANIFEST_FILE}: lists {record.name[:80]!r}, which is no file of a checkpoint"
        )
    path = folder / record.name
    try:
        status = os.lstat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; use another checkpoint") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: no regular file; use another checkpoint")
    if status.st_size != record.size:
        raise UserError(f"{path}: has {status.st_size} of {record.size} bytes; use another checkpoint")


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
