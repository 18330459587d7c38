"""The tokenizer: sentencepiece BPE with byte fallback, trained on a corpus and lossless on any text.

Ids: 0 is <unk> (never produced, since bytes cover everything), 1 closes a document, then come the 256
bytes and the learned pieces. Text comes back exactly but for U+2581, sentencepiece's own sign for a
space, which comes back as a space.
"""

import hashlib
import heapq
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import sentencepiece

from ..errors import UserError
from .permutation import derive_key, mix64

__all__ = ["DEFAULT_SAMPLE_BYTES", "END_OF_DOCUMENT", "Tokenizer", "train_tokenizer"]

END_OF_DOCUMENT = "<|endofdocument|>"

DEFAULT_SAMPLE_BYTES = 64 * 2**20
"""Enough text for the pieces of a large vocabulary to settle; training on it takes seconds, not minutes."""

# sentencepiece wants a bound on its "sentences". Blocks this long waste no text at their cuts and
# keep newlines inside, so that pieces such as ":\n" and "\n\n" are learned.
TRAINING_BLOCK = 2**16
# Encoding needs about a hundred times the text's memory, so a long document goes in by parts.
ENCODING_BLOCK = 2**20


class Tokenizer:
    """A trained tokenizer.

    Attributes:
        path: the model file it was loaded from.
        vocab_size: ids are 0 … vocab_size - 1.
        end_of_document: the id that closes a document; no text encodes to it.
        fingerprint: SHA-256 of the model file, in hex.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(
                f"{path}: not a sentencepiece model; make one with `plait data tokenizer`"
            ) from None
        self._model = model
        self.path = path
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_document: int = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.end_of_document < 0:
            raise UserError(f"{path}: this model has no end-of-document id (eos); train one that has")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a sentencepiece model file.

        Raises:
            UserError: no such file, not a model, or a model without an end-of-document id.
        """
        path = Path(path)
        try:
            return cls(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"{path}: no tokenizer can be read here: {error.strerror}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-document id."""
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of several texts, as :meth:`encode` gives them, on all cores unless told otherwise."""
        parts = [list(_blocks(text, ENCODING_BLOCK)) for text in texts]
        encoded = iter(
            self._processor.encode(
                [block for blocks in parts for block in blocks],
                num_threads=num_threads or os.cpu_count() or 1,
            )
        )
        return [[token for _ in blocks for token in next(encoded)] for blocks in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def save(self, path: str | Path) -> None:
        """Write the model file, at once or not at all; it loads as this very tokenizer."""
        path = Path(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(self._model)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)


def train_tokenizer(
    documents: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 0,
) -> Tokenizer:
    """Train on a sample of the documents and write the model file at once, or not at all.

    The sample is uniform over blocks of 64 Ki characters, takes one pass and ``sample_bytes`` of
    memory, and depends on the documents and the seed alone; so do the model's bytes.

    Args:
        documents: texts; read once.
        vocab_size: ids in all, with the 256 bytes and 2 control ids.
        sample_bytes: how many bytes of text to train on at most.
        seed: decides which blocks are taken.

    Raises:
        UserError: a vocabulary too small for the characters, or larger than the text gives.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: no file can be written here; name a file in an existing folder")
    tokenizer = Tokenizer(_train(_sample(documents, sample_bytes, seed), vocab_size), path)
    tokenizer.save(path)
    return tokenizer


def _train(blocks: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(blocks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation is learned as pieces of several spaces.
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=32,
            split_digits=True,
            max_sentence_length=4 * TRAINING_BLOCK,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            # The number of threads is written into the model, so it must not follow the machine.
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if most := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size = {vocab_size} is more than this text gives; choose at most {most[1]}, or more text"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size = {vocab_size} is too small for bytes and characters; choose at least {least[1]}"
    return f"vocab_size = {vocab_size}: sentencepiece refused to train: {message}"


def _sample(documents: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """Blocks of the documents, at most ``sample_bytes`` together, in their order.

    Every block draws a number from its place and the seed; those with the lowest numbers stay.
    """
    key = derive_key(seed, "tokenizer sample")
    kept: list[tuple[int, int, str]] = []
    held = 0
    blocks = (block for text in documents for block in _blocks(text, TRAINING_BLOCK))
    for index, block in enumerate(blocks):
        heapq.heappush(kept, (-mix64(mix64(index) ^ key), index, block))
        held += len(block.encode())
        while held > sample_bytes and len(kept) > 1:
            held -= len(heapq.heappop(kept)[2].encode())
    return [block for _, _, block in sorted(kept, key=lambda entry: entry[1])]


def _blocks(text: str, size: int) -> Iterator[str]:
    """The text in parts of at most ``size`` characters, cut before a newline where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start + 1, start + size)
        cut = start + size if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]
