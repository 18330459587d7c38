"""The manifest beside a corpus's shards: which tokenizer made them, what they hold, their checksums."""

import hashlib
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserError
from .plain_file import parse_json, read_plain

__all__ = [
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "MaskRecord",
    "Split",
    "entropy",
    "manifest_of",
    "read_manifest",
]

MANIFEST = "manifest.json"
KIND = "plait corpus"
MOST_BYTES = 256 << 20


class Record(BaseModel):
    """Frozen, and strict about names, so that a manifest of another version does not half load."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """A file's size in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, **more: int) -> Self:
        """The record of a file as it is now; ``more`` is what a kind of record holds besides."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(bytes=path.stat().st_size, sha256=digest, **more)


class MaskRecord(FileRecord):
    """A mask's file, and how many tokens it lets count as targets."""

    counted_tokens: int


class Split(Record):
    """What ``train`` or ``validation`` holds; tokens count the end-of-document ids, bytes the text.

    ``mask`` is null where every token counts as a target.
    """

    documents: int
    tokens: int
    text_bytes: int
    bin: FileRecord
    idx: FileRecord
    mask: MaskRecord | None = None

    def files(self, prefix: str | Path) -> dict[Path, FileRecord]:
        """The records by the paths of the files they describe."""
        records = {"bin": self.bin, "idx": self.idx, "mask": self.mask}
        return {Path(f"{prefix}.{suffix}"): record for suffix, record in records.items() if record}


class Manifest(Record):
    """The facts of a corpus folder.

    ``unigram_entropy`` is that of the train split's tokens, in nats a token: a model that has learned
    frequencies and nothing else ends at this loss. ``bytes_per_token`` is the train split's as well.
    """

    format: Literal["plait corpus 1"] = "plait corpus 1"
    corpus: list[str]
    seed: int
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    dtype: Literal["uint16", "int32"]
    bytes_per_token: float
    unigram_entropy: float
    splits: dict[str, Split]


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest in a folder; None where there is none, or one of another program.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = Path(folder) / MANIFEST
    try:
        tree = parse_json(read_plain(path, most=MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: not JSON, perhaps cut off; rebuild the corpus or copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(tree, dict) or not str(tree.get("format")).startswith(KIND):
        return None
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}; rebuild the corpus or copy it again") from None


def manifest_of(prefix: str | Path) -> Manifest | None:
    """The manifest that covers PREFIX.bin and PREFIX.idx; None for shards that came without one."""
    prefix = Path(prefix)
    manifest = read_manifest(prefix.parent)
    return manifest if manifest and prefix.name in manifest.splits else None


def entropy(counts: np.ndarray) -> float:
    """Of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
