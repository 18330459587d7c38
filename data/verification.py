"""Verifying a corpus folder: every byte is read again, every count counted again."""

import math
from pathlib import Path

import numpy as np

from ..errors import UserError
from .manifest import MANIFEST, FileRecord, Manifest, Split, entropy, read_manifest
from .shards import Shard
from .tokenizer import find_tokenizer, load_tokenizer

__all__ = ["verify"]

CHUNK_TOKENS = 2**22


def verify(folder: str | Path) -> Manifest:
    """Compare a corpus with its manifest: checksums, counts, every id, every document's end, masks.

    Reads everything once for the checksums and once for the rest, and holds little of it. The bytes of
    text are the one number that shards cannot give again.

    Raises:
        UserError: no manifest, or the first thing that differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: holds no {MANIFEST} to verify against; name a folder of `plait data build`"
        )
    for name, split in manifest.splits.items():
        for path, record in split.files(folder / name).items():
            _check_file(path, record)
    _check_tokenizer(folder, manifest)
    for name, split in manifest.splits.items():
        counts = _check_split(Shard(folder / name), split, manifest)
        if name == "train":
            _check_facts(folder / MANIFEST, manifest, split, counts)
    return manifest


def _check_file(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise UserError(f"{path}: is missing; rebuild the corpus or copy it again")
    found = FileRecord.of(path)
    if (found.bytes, found.sha256) != (record.bytes, record.sha256):
        what = (
            f"{found.bytes} bytes, the manifest says {record.bytes}"
            if found.bytes != record.bytes
            else "its SHA-256 is not the manifest's"
        )
        raise UserError(f"{path}: {what}; rebuild the corpus or copy it again")


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    found = find_tokenizer(folder)
    if found is None:
        raise UserError(f"{folder}: its tokenizer is missing; rebuild the corpus or copy it again")
    tokenizer = load_tokenizer(found)
    if tokenizer.fingerprint != manifest.tokenizer_sha256:
        raise UserError(f"{found}: not the tokenizer that the manifest names; rebuild or copy it again")
    for name in ("vocab_size", "end_of_document"):
        if getattr(tokenizer, name) != getattr(manifest, name):
            raise _differs(
                folder / MANIFEST, name, getattr(manifest, name), "tokenizer says", getattr(tokenizer, name)
            )


def _check_split(shard: Shard, split: Split, manifest: Manifest) -> np.ndarray:
    """Read a split's tokens; returns how often each id occurs, int64 (vocabulary,)."""
    shard.check_index()
    for name, found in (("documents", shard.num_documents), ("tokens", shard.num_tokens)):
        if found != getattr(split, name):
            raise _differs(shard.bin.parent / MANIFEST, name, getattr(split, name), "shards say", found)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    documents = counted = 0
    for start in range(0, shard.num_tokens, CHUNK_TOKENS):
        length = min(CHUNK_TOKENS, shard.num_tokens - start)
        # One more token tells whether the last of these ends a document.
        tokens, starts = shard.read(start, min(length + 1, shard.num_tokens - start))
        ends = np.append(starts[1:], True)[:length]
        _check_tokens(shard, start, tokens[:length], ends, manifest)
        counts += np.bincount(tokens[:length], minlength=len(counts))
        documents += int(ends.sum())
        counted += int(shard.counted(start, length).sum())
    if documents != split.documents:
        raise UserError(f"{shard.idx}: {split.documents - documents} documents are empty; rebuild the corpus")
    if split.mask and counted != split.mask.counted_tokens:
        raise _differs(
            shard.bin.parent / MANIFEST,
            "mask.counted_tokens",
            split.mask.counted_tokens,
            "mask says",
            counted,
        )
    return counts


def _check_tokens(shard: Shard, start: int, tokens: np.ndarray, ends: np.ndarray, manifest: Manifest) -> None:
    """Ids of the vocabulary, and the one that ends documents at every end and nowhere else."""
    for wrong, what in (
        (
            (tokens < 0) | (tokens >= manifest.vocab_size),
            f"its tokenizer has ids below {manifest.vocab_size}",
        ),
        ((tokens == manifest.end_of_document) & ~ends, "which ends documents, inside of it"),
        ((tokens != manifest.end_of_document) & ends, f"as its last, not {manifest.end_of_document}"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            document = shard.document_at(start + place)
            raise UserError(
                f"{shard.bin}: document {document} holds the id {tokens[place]}, {what}; rebuild the corpus"
            )


def _check_facts(path: Path, manifest: Manifest, split: Split, counts: np.ndarray) -> None:
    facts = {"unigram_entropy": entropy(counts), "bytes_per_token": split.text_bytes / split.tokens}
    for name, found in facts.items():
        if not math.isclose(getattr(manifest, name), found, rel_tol=1e-9, abs_tol=1e-12):
            raise _differs(path, name, getattr(manifest, name), "shards say", found)


def _differs(path: Path, key: str, said: object, what: str, found: object) -> UserError:
    return UserError(f"{path}: {key} = {said}, the {what} {found}; rebuild the corpus or copy it again")
