"""Building a corpus folder: documents in, shuffled shards, tokenizer and manifest out, all or nothing.

    documents --encode--> scratch file, in the order they came
              --shuffle-> train.bin/.idx and validation.bin/.idx, by Megatron's own builder
              --rename--> OUT/

Memory holds some 40 bytes a document; the text and the tokens stream.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .atomic_folder import appearing_at_once
from .documents import Document, Mask
from .encoding import Encoder, encode_documents
from .manifest import MANIFEST, FileRecord, Manifest, MaskRecord, Split, entropy, read_manifest
from .mask import MaskWriter
from .megatron import indexed_dataset
from .permutation import derive_key, shuffled
from .tokenizer import Tokenizer

__all__ = ["Progress", "build", "num_held_out"]

SPLITS = ("train", "validation")
OURS = {MANIFEST, "tokenizer.model", "tokenizer"} | {
    f"{name}.{suffix}" for name in SPLITS for suffix in ("bin", "idx", "mask")
}
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
    """All documents' tokens one after the other in a file, and for each document where it ends, how many
    of its tokens are a prompt's, and its bytes of text."""

    tokens: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray
    text_bytes: np.ndarray


def build(
    out: str | Path,
    documents: Iterable[Document | str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    validation: float | None = None,
    mask: Mask = "none",
    workers: int = 1,
    description: Sequence[str] = (),
    force: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
) -> Manifest:
    """Write a corpus folder, which appears complete or not at all.

    It replaces a corpus that was built with the same tokenizer; it never replaces anything else.

    Args:
        out: the folder; those above it are made.
        documents: read once; a str is a document without a prompt.
        tokenizer: its end-of-document id closes every document.
        seed: decides the order of the documents and which are held out.
        validation: documents to hold out; see :func:`num_held_out`.
        mask: "prompt" writes masks by which the tokens of prompts are no targets.
        workers: processes that tokenize; the bytes written are the same for any number.
        description: what the corpus is, for the manifest.
        force: replace a corpus of another tokenizer too.
        report: called now and then.

    Raises:
        UserError: no document, ``out`` is something else than a corpus, another tokenizer, another
            build at work, a held-out share that leaves nothing to train on, masks without a prompt, or
            a process that died.
    """
    out = Path(os.path.abspath(out))
    _check_target(out, tokenizer, force)
    encoder = Encoder(tokenizer, _dtype_for(tokenizer))
    with appearing_at_once(out) as folder:
        scratch = _tokenize(documents, encoder, workers, folder / "scratch", report)
        if mask == "prompt" and not scratch.prompts.any():
            raise UserError(
                "mask = prompt, but no document has a prompt; name the rows' keys with --prompt-key and "
                "--completion-key, or build without a mask"
            )
        order = shuffled(len(scratch.ends), derive_key(seed, "documents"))
        held_out = num_held_out(len(order), validation)
        splits: dict[str, Split] = {}
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for name, part in zip(SPLITS, (order[held_out:], order[:held_out]), strict=True):
            if len(part):
                counted = counts if name == "train" else None
                splits[name] = _write_split(folder / name, scratch, part, mask, counted, report)
        del scratch
        (folder / "scratch").unlink()
        tokenizer.save_into(folder)
        train = splits["train"]
        manifest = Manifest(
            corpus=list(description),
            seed=seed,
            tokenizer_sha256=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype="uint16" if encoder.dtype == np.uint16 else "int32",
            bytes_per_token=train.text_bytes / train.tokens,
            unigram_entropy=entropy(counts),
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
    strangers = sorted({path.name for path in out.iterdir()} - OURS)
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
    documents: Iterable[Document | str],
    encoder: Encoder,
    workers: int,
    path: Path,
    report: Callable[[Progress], None],
) -> Scratch:
    columns: list[tuple[np.ndarray, ...]] = []
    num_documents = num_tokens = num_bytes = 0
    with path.open("wb") as file, closing(encode_documents(documents, encoder, workers)) as batches:
        for encoded in batches:
            file.write(encoded.tokens.tobytes())
            columns.append((encoded.lengths, encoded.prompts, encoded.text_bytes))
            num_documents += len(encoded.lengths)
            num_tokens += len(encoded.tokens)
            num_bytes += int(encoded.text_bytes.sum())
            report(Progress("tokenize", num_documents, num_tokens, num_bytes, None))
    if not num_documents:
        raise UserError("the corpus holds no documents; name one that does")
    tokens = np.memmap(path, dtype=encoder.dtype, mode="r")
    lengths, prompts, text_bytes = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Scratch(tokens, np.cumsum(lengths), prompts, text_bytes)


def _write_split(
    prefix: Path,
    scratch: Scratch,
    part: np.ndarray,
    mask: Mask,
    counts: np.ndarray | None,
    report: Callable[[Progress], None],
) -> Split:
    """Write the documents of ``part`` in its order; add their tokens to ``counts`` (vocabulary,)."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=scratch.tokens.dtype.type)
    num_tokens = num_bytes = 0
    with ExitStack() as stack:
        writer = stack.enter_context(MaskWriter(Path(f"{prefix}.mask"))) if mask == "prompt" else None
        for start in range(0, len(part), REPORT_DOCUMENTS):
            group = part[start : start + REPORT_DOCUMENTS]
            written = []
            for document in group:
                begin = scratch.ends[document - 1] if document else 0
                tokens = np.asarray(scratch.tokens[begin : scratch.ends[document]])
                builder.add_document(tokens, [len(tokens)])
                written.append(tokens)
                if writer:
                    writer.append(np.arange(len(tokens)) >= scratch.prompts[document])
            num_tokens += sum(map(len, written))
            num_bytes += int(scratch.text_bytes[group].sum())
            if counts is not None:
                counts += np.bincount(np.concatenate(written), minlength=len(counts))
            report(Progress(f"write {prefix.name}", start + len(group), num_tokens, num_bytes, len(part)))
    builder.finalize(f"{prefix}.idx")
    return Split(
        documents=len(part),
        tokens=num_tokens,
        text_bytes=num_bytes,
        bin=FileRecord.of(Path(f"{prefix}.bin")),
        idx=FileRecord.of(Path(f"{prefix}.idx")),
        mask=MaskRecord.of(Path(f"{prefix}.mask"), counted_tokens=writer.counted) if writer else None,
    )
