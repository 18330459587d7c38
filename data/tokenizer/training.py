"""Training a sentencepiece tokenizer on a sample of a corpus."""

import heapq
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from ...errors import UserError
from ..permutation import derive_key, mix64
from .interface import write_whole
from .sentencepiece import END_OF_DOCUMENT, MODEL_FILE, SentencePieceTokenizer

__all__ = ["DEFAULT_SAMPLE_BYTES", "train_tokenizer"]

DEFAULT_SAMPLE_BYTES = 64 * 2**20
"""Enough text for the pieces of a large vocabulary to settle; training on it takes seconds, not minutes."""

# sentencepiece wants a bound on its "sentences". Blocks this long waste no text at their cuts and
# keep newlines inside, so that pieces such as ":\n" and "\n\n" are learned.
TRAINING_BLOCK = 2**16


def train_tokenizer(
    documents: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 0,
) -> SentencePieceTokenizer:
    """Train on a sample of the documents and write the model file at once or not at all.

    The sample is uniform over blocks of 64 Ki characters, takes one pass and ``sample_bytes`` of
    memory, and depends on the documents and the seed alone; so do the model's bytes.

    Args:
        documents: texts; read once.
        path: the file; folders above it are made.
        vocab_size: ids in all, with the 256 bytes and 2 control ids.
        sample_bytes: how many bytes of text to train on at most.
        seed: decides which blocks are taken.

    Raises:
        UserError: a vocabulary too small for the characters, or larger than the text gives, or a path
            that cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the model file to write")
    if not next(parent for parent in path.absolute().parents if parent.exists()).is_dir():
        raise UserError(f"{path}: lies under a file, where no folder can be made; name another place")
    model = _train(_sample(documents, sample_bytes, seed), vocab_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, model)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another place") from None
    return SentencePieceTokenizer({MODEL_FILE: model}, path)


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
    blocks = (block for text in documents for block in _blocks(text))
    for index, block in enumerate(blocks):
        heapq.heappush(kept, (-mix64(mix64(index) ^ key), index, block))
        held += len(block.encode())
        while held > sample_bytes and len(kept) > 1:
            held -= len(heapq.heappop(kept)[2].encode())
    return [block for _, _, block in sorted(kept, key=lambda entry: entry[1])]


def _blocks(text: str) -> Iterator[str]:
    """The text in parts that sentencepiece can train on, cut before a newline where there is one."""
    start = 0
    while len(text) - start > TRAINING_BLOCK:
        cut = text.rfind("\n", start + 1, start + TRAINING_BLOCK)
        cut = start + TRAINING_BLOCK if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]
