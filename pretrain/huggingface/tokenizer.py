"""The run's tokenizer in its export. One of Hugging Face's kind is copied; a sentencepiece model becomes
a tokenizer.json that gives the same ids for any text.

sentencepiece joins, again and again, the two neighbours whose joined piece has the best score, the
leftmost where there are several. The tokenizers library joins the pair that stands first in a list
of merges. Several pairs can make one piece, (a, bc) and (ab, c), and as neighbours in that list they
would part what sentencepiece holds equal. But only one of them can ever meet: while no join crosses
the borders of a stretch of text, what happens inside depends on that stretch alone, so two symbols
that make up a piece are the last two of that piece tokenized by itself. So each piece has one merge,
that one, in the order of the scores; ties are gone, and both libraries join the same pairs in the
same order.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from ...data.tokenizer import Tokenizer
from ...data.tokenizer.interface import Kind
from ...errors import UserError

__all__ = [
    "ConvertedTokenizer",
    "ExportedTokenizer",
    "SpecialIds",
    "convert_tokenizer",
    "export_tokenizer",
    "merges_of",
]

SPACE = "\u2581"
"""What sentencepiece writes for a space."""

proto: Any = sentencepiece_model_pb2
Piece = proto.ModelProto.SentencePiece


@dataclass(frozen=True)
class SpecialIds:
    end_of_document: int
    padding: int | None
    """<unk> in plait's own tokenizers, which no text gives. To pad by the end of a document would mask
    that end from the loss of whoever trains on, since padding is masked."""


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A sentencepiece model as transformers reads it."""

    files: dict[str, str]
    """Name -> text: tokenizer.json and tokenizer_config.json."""
    special: SpecialIds


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer's files in an export."""

    kind: Kind
    files: dict[str, bytes]
    special: SpecialIds
    note: str | None = None
    """Why transformers has no tokenizer.json to read; None where it has one."""


def export_tokenizer(tokenizer: Tokenizer, *, imported: bool) -> ExportedTokenizer:
    """The files of a run's tokenizer.

    Args:
        imported: the tokenizer came with a model, so that one which no tokenizer.json can say goes on
            as it came.

    Raises:
        UserError: see :func:`convert_tokenizer`; of a tokenizer that was not imported.
    """
    special = SpecialIds(end_of_document=tokenizer.end_of_document, padding=None)
    if tokenizer.kind == "huggingface":
        return ExportedTokenizer(tokenizer.kind, tokenizer.files, special)
    try:
        converted = convert_tokenizer(tokenizer.path)
    except UserError as error:
        if not imported:
            raise
        return ExportedTokenizer(
            tokenizer.kind, tokenizer.files, special, f"no tokenizer.json was written: {error}"
        )
    made = {name: text.encode() for name, text in converted.files.items()}
    return ExportedTokenizer(tokenizer.kind, tokenizer.files | made, converted.special)


def convert_tokenizer(path: Path) -> ConvertedTokenizer:
    """Convert a sentencepiece model file.

    Raises:
        UserError: a model that tokenizer.json cannot say: no BPE, no byte fallback, a normalisation.
    """
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    _check(model, path)
    pieces = list(model.pieces)
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == Piece.UNKNOWN)
    end = next(i for i, piece in enumerate(pieces) if piece.piece == model.trainer_spec.eos_piece)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": pieces[end].piece,
        "unk_token": pieces[unknown].piece,
        "pad_token": pieces[unknown].piece,
        "clean_up_tokenization_spaces": False,
        # A text that happens to spell <|endofdocument|> or <unk> is text.
        "split_special_tokens": True,
    }
    files = {
        "tokenizer.json": _tokenizer_json(pieces, unknown, end),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    return ConvertedTokenizer(files, SpecialIds(end_of_document=end, padding=unknown))


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The one merge of each piece that joins can reach, best score first.

    Args:
        scores: piece -> its score; all different among pieces of several characters.
    """
    merges = []
    for piece in sorted((p for p in scores if len(p) > 1), key=scores.__getitem__, reverse=True):
        last = _last_two(piece, scores)
        if last is not None:
            merges.append(last)
    return merges


def _last_two(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """What sentencepiece joins last when it tokenizes this piece; None where it gets stuck before."""
    symbols = list(piece)
    while len(symbols) > 2:
        best, place = -math.inf, -1
        for i in range(len(symbols) - 1):
            score = scores.get(symbols[i] + symbols[i + 1], -math.inf)
            if score > best:
                best, place = score, i
        if place < 0:
            return None
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return symbols[0], symbols[1]


def _tokenizer_json(pieces: list[Any], unknown: int, end: int) -> str:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(pieces)},
            merges=merges_of(scores),
            unk_token=pieces[unknown].piece,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(pieces[i].piece, special=True, normalized=False) for i in (unknown, end)]
    )
    return tokenizer.to_str(pretty=True) + "\n"


def _check(model: Any, path: Path) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = list(model.pieces)
    kinds = {piece.type for piece in pieces}
    normal = [piece for piece in pieces if piece.type == Piece.NORMAL]
    characters = {piece.piece for piece in normal if len(piece.piece) == 1}
    longer = [piece.score for piece in normal if len(piece.piece) > 1]
    faults = {
        "it is no BPE model": trainer.model_type != proto.TrainerSpec.BPE,
        "it has no byte fallback": not trainer.byte_fallback,
        "it normalises text": bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces,
        "it adds a space before a text": normalizer.add_dummy_prefix,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it writes spaces as suffixes": trainer.treat_whitespace_as_suffix,
        "it changes text after decoding": bool(model.denormalizer_spec.precompiled_charsmap),
        "it has user-defined or unused pieces": bool(kinds & {Piece.USER_DEFINED, Piece.UNUSED}),
        "two of its pieces have the same score": len(set(longer)) < len(longer),
        "a piece has a character that is no piece itself": any(set(p.piece) - characters for p in normal),
    }
    for fault, present in faults.items():
        if present:
            raise UserError(
                f"{path}: this tokenizer cannot be written as tokenizer.json with the same ids: {fault}; "
                "only models as `plait data tokenizer` makes them export"
            )
