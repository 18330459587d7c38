"""The sentencepiece kind: one model file, made by `plait data tokenizer` or by others.

In plait's own models id 0 is <unk> (never produced, since bytes cover everything), 1 closes a document,
then come the 256 bytes and the learned pieces. Text comes back exactly but for U+2581, sentencepiece's
own sign for a space, which comes back as a space.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ...errors import UserError
from .interface import Tokenizer

__all__ = ["END_OF_DOCUMENT", "MODEL_FILE", "SentencePieceTokenizer"]

END_OF_DOCUMENT = "<|endofdocument|>"
MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"

# Encoding needs about a hundred times the text's memory, so a long document goes in by parts.
ENCODING_BLOCK = 2**20

proto: Any = sentencepiece_model_pb2


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Raises:
        UserError: bytes that are no model, or a model without an end-of-document id.
    """

    kind = "sentencepiece"
    folder = ""

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        super().__init__(files, path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.files[MODEL_FILE])
        except RuntimeError:
            raise UserError(
                f"{path}: not a sentencepiece model; make one with `plait data tokenizer`"
            ) from None
        self.vocab_size = self._processor.vocab_size()
        self.end_of_document = self._processor.eos_id()
        if self.end_of_document < 0:
            raise UserError(f"{path}: this model has no end-of-document id (eos); train one that has")

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        threads = num_threads or os.cpu_count() or 1
        if not any(len(text) > ENCODING_BLOCK for text in texts):
            return self._processor.encode(list(texts), num_threads=threads)
        parts = [self._parts(text) for text in texts]
        encoded = iter(self._processor.encode(list(itertools.chain(*parts)), num_threads=threads))
        return [list(itertools.chain(*itertools.islice(encoded, len(of_text)))) for of_text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _parts(self, text: str) -> list[str]:
        """A long text in parts whose ids, one after the other, are those of the whole.

        BPE joins neighbours into pieces of the vocabulary and nothing else. So where two characters
        stand together in no piece, no join ever crosses from one to the other, and what happens on
        either side depends on that side alone. A text without such a place stays whole.
        """
        if len(text) <= ENCODING_BLOCK or self._joined is None:
            return [text]
        begins = [0, *self._cuts(text), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(begins)]

    def _cuts(self, text: str) -> Iterator[int]:
        begin = 0
        while len(text) - begin > ENCODING_BLOCK:
            block = begin + ENCODING_BLOCK
            places = itertools.chain(range(block, begin, -1), range(block + 1, len(text)))
            cut = next((i for i in places if self._parted(text[i - 1], text[i])), None)
            if cut is None:
                return
            yield cut
            begin = cut

    def _parted(self, left: str, right: str) -> bool:
        return (left + right).replace(" ", SPACE) not in (self._joined or ())

    @cached_property
    def _joined(self) -> frozenset[str] | None:
        """Two characters that stand together in some piece; None where the model is no plain BPE: what
        a normaliser does to a text's ends, it would do at every cut."""
        model = proto.ModelProto()
        model.ParseFromString(self.files[MODEL_FILE])
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if (
            trainer.model_type != proto.TrainerSpec.BPE
            or not trainer.byte_fallback
            or normalizer.precompiled_charsmap
            or normalizer.add_dummy_prefix
            or normalizer.remove_extra_whitespaces
            or not normalizer.escape_whitespaces
        ):
            return None
        words = (piece.piece for piece in model.pieces)
        return frozenset(a + b for word in words for a, b in itertools.pairwise(word))
