"""Building a corpus folder: documents in, shuffled shards, tokenizer and manifest out, all or nothing.

    documents --encode--> scratch file, in the order they came
              --shuffle-> train.bin/.idx and validation.bin/.idx, by Megatron's own builder
              --rename--> OUT/

Memory holds some 32 bytes a document; the text and the tokens stream.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .manifest import MANIFEST, FileRecord, Manifest, Split, read_manifest
from .permutation import derive_key, shuffled
from .shards import megatron_indexed_dataset
from .tokenizer import Tokenizer

__all__ = ["Progress", "build", "num_held_out"]

TOKENIZER = "tokenizer.model"
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 4 * 2**20
BATCH_DOCUMENTS = 4096
REPORT_DOCUMENTS = 256
MOST_HELD_OUT = 10_000


class Progress(NamedTuple):
    """How far a build has come. ``total`` documents are known once the text has been read."""

    phase: str
    documents: int
    tokens: int
    text_bytes: int
    total: int | None


class Scratch(NamedTuple):
    """All documents' tokens one after the other in a file, where each ends, and its bytes of text."""

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray


def build(
    out: str | Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    validation: float | None = None,
    description: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
) -> Manifest:
    """Write a corpus folder, which appears complete or not at all.

    It replaces a corpus that was built with the same tokenizer; it never replaces anything else.

    Args:
        out: the folder.
        documents: texts; read once.
        tokenizer: its end-of-document id closes every document.
        seed: decides the order of the documents and which are held out.
        validation: documents to hold out; see :func:`num_held_out`.
        description: what the corpus is, for the manifest.
        force: replace a corpus of another tokenizer too.
        report: called now and then.

    Raises:
        UserError: no document, ``out`` is something else than a corpus, another tokenizer, another
            build at work, or a held-out share that leaves nothing to train on.
    """
    out = Path(os.path.abspath(out))
    _check_target(out, tokenizer, force)
    dtype = _dtype_for(tokenizer)
    with _appearing_at_once(out) as folder:
        scratch = _tokenize(documents, tokenizer, dtype, folder / "scratch", report)
        order = shuffled(len(scratch.ends), derive_key(seed, "documents"))
        held_out = num_held_out(len(order), validation)
        splits: dict[str, Split] = {}
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for name, part in zip(SPLITS, (order[held_out:], order[:held_out]), strict=True):
            if len(part):
                counted = counts if name == "train" else None
                splits[name] = _write_split(folder / name, scratch, part, counted, report)
        del scratch
        (folder / "scratch").unlink()
        tokenizer.save(folder / TOKENIZER)
        train = splits["train"]
        manifest = Manifest(
            corpus=list(description),
            seed=seed,
            tokenizer_sha256=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype="uint16" if dtype == np.uint16 else "int32",
            bytes_per_token=train.text_bytes / train.tokens,
            unigram_entropy=_entropy(counts),
            splits=splits,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def num_held_out(documents: int, validation: float | None = None) -> int:
    """How many documents to hold out of so many.

    Args:
        documents: in all.
        validation: a number below 1 is a share, at least one document; 1 and above is a count; 0
            holds out nothing; None means one in a hundred, at least 1 and at most 10 000, which is
            some ten million tokens and more than an evaluation reads.

    Raises:
        UserError: a negative or broken number, or nothing left to train on.
    """
    if validation is None:
        held_out = min(max(1, documents // 100), MOST_HELD_OUT)
    elif not validation >= 0 or (validation >= 1 and validation != int(validation)):
        raise UserError(f"validation = {validation}: give a share below 1, a whole number of documents, or 0")
    elif validation >= 1 or validation == 0:
        held_out = int(validation)
    else:
        held_out = max(1, round(documents * validation))
    if held_out >= documents:
        raise UserError(
            f"validation: {held_out} held out of {documents} documents leaves none to train on; "
            "hold out fewer (0 for none) or bring more documents"
        )
    return held_out


def _check_target(out: Path, tokenizer: Tokenizer, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to build into")
    ours = {MANIFEST, TOKENIZER, *(f"{name}.{suffix}" for name in SPLITS for suffix in ("bin", "idx"))}
    strangers = sorted({path.name for path in out.iterdir()} - ours)
    if strangers:
        raise UserError(f"{out}: holds {strangers[0]}, which no build wrote; name a new folder")
    manifest = read_manifest(out)
    if manifest is None and any(out.iterdir()):
        raise UserError(f"{out}: holds shards without a {MANIFEST}, so not built here; name a new folder")
    if manifest and manifest.tokenizer_sha256 != tokenizer.fingerprint and not force:
        raise UserError(
            f"{out}: was built with tokenizer {manifest.tokenizer_sha256[:12]}…, not with {tokenizer.path} "
            f"({tokenizer.fingerprint[:12]}…); name a new folder, or replace it with --force"
        )


def _dtype_for(tokenizer: Tokenizer) -> type[np.uint16] | type[np.int32]:
    """The smallest dtype Megatron stores that holds every id; its builder wraps what overflows."""
    if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1:
        return np.uint16
    if tokenizer.vocab_size <= np.iinfo(np.int32).max:
        return np.int32
    raise UserError(f"{tokenizer.path}: a vocabulary of {tokenizer.vocab_size} does not fit 32-bit ids")


def _tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    dtype: type[np.integer],
    path: Path,
    report: Callable[[Progress], None],
) -> Scratch:
    lengths: list[np.ndarray] = []
    text_bytes: list[np.ndarray] = []
    num_documents = num_tokens = num_bytes = 0
    with path.open("wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch(batch)
            for ids in encoded:
                file.write(np.array([*ids, tokenizer.end_of_document], dtype=dtype).tobytes())
            lengths.append(np.array([len(ids) + 1 for ids in encoded], dtype=np.int64))
            text_bytes.append(np.array([len(text.encode()) for text in batch], dtype=np.int64))
            num_documents += len(batch)
            num_tokens += int(lengths[-1].sum())
            num_bytes += int(text_bytes[-1].sum())
            report(Progress("tokenize", num_documents, num_tokens, num_bytes, None))
    if not num_documents:
        raise UserError("the corpus holds no documents; name one that does")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return Scratch(tokens, np.cumsum(np.concatenate(lengths)), np.concatenate(text_bytes))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_split(
    prefix: Path,
    scratch: Scratch,
    part: np.ndarray,
    counts: np.ndarray | None,
    report: Callable[[Progress], None],
) -> Split:
    """Write the documents of ``part`` in its order; add their tokens to ``counts`` (vocabulary,)."""
    builder = megatron_indexed_dataset().IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=scratch.tokens.dtype.type
    )
    num_tokens = num_bytes = 0
    for start in range(0, len(part), REPORT_DOCUMENTS):
        written = []
        for document in part[start : start + REPORT_DOCUMENTS]:
            begin = scratch.ends[document - 1] if document else 0
            tokens = np.asarray(scratch.tokens[begin : scratch.ends[document]])
            builder.add_document(tokens, [len(tokens)])
            written.append(tokens)
            num_tokens += len(tokens)
            num_bytes += int(scratch.text_bytes[document])
        if counts is not None:
            counts += np.bincount(np.concatenate(written), minlength=len(counts))
        report(Progress(f"write {prefix.name}", start + len(written), num_tokens, num_bytes, len(part)))
    builder.finalize(f"{prefix}.idx")
    return Split(
        documents=len(part),
        tokens=num_tokens,
        text_bytes=num_bytes,
        bin=FileRecord.of(Path(f"{prefix}.bin")),
        idx=FileRecord.of(Path(f"{prefix}.idx")),
    )


def _entropy(counts: np.ndarray) -> float:
    """Of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@contextmanager
def _appearing_at_once(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``out`` at the end and vanishes if anything fails.

    What a killed build left behind is cleared by the next; a build at work is told by its lock.
    """
    folder = out.with_name(f".{out.name}.building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made here: {error.strerror}; name another place") from None
    try:
        _lock(lock, folder, out)
        _clear(folder)
        try:
            yield folder
            _replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(lock: int, folder: Path, out: Path) -> None:
    busy = UserError(f"{out}: another build is writing it; wait for it or name another folder")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    # Between opening and locking, the other build may have finished and renamed what was opened.
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return
    raise busy


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _replace(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    folder.rename(out)
    shutil.rmtree(old)
