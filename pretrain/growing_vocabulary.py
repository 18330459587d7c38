"""A vocabulary that grows where a run begins with another's weights: which tensors, and which tokenizers."""

from pathlib import Path

from ..data.manifest import Manifest
from ..data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ..errors import UserError

__all__ = ["ROWS_OF_VOCABULARY", "check_first_ids"]

ROWS_OF_VOCABULARY = ("model.embedding.weight", "model.head.weight")
"""Tensors with a row for each id."""


def check_first_ids(prefix: str, manifest: Manifest, tokenizer: Tokenizer, run: Path, *, grows: bool) -> None:
    """Hold the tokenizer of a corpus against the one that a run's weights were trained with.

    Args:
        prefix: of the corpus's shards.
        manifest: theirs.
        tokenizer: of the run that is begun from.
        grows: whether the corpus's may have further ids, as `checkpoint.grow_vocabulary` says.

    Raises:
        UserError: the corpus was built with another one, or with one that does more than add ids.
    """
    if manifest.tokenizer_sha256 == tokenizer.fingerprint:
        return
    source = find_tokenizer(Path(prefix).parent)
    corpus = load_tokenizer(source) if source else None
    if corpus and corpus.fingerprint != manifest.tokenizer_sha256:
        corpus = None
    fault = _fault(tokenizer, corpus)
    whose = f"the one of checkpoint.init_from = {run}"
    if grows and fault:
        raise UserError(
            f"{prefix}: built with another tokenizer than {whose}, and {fault}; checkpoint.grow_vocabulary "
            "wants one that keeps those ids and adds others"
        )
    if not grows:
        added = f", or set checkpoint.grow_vocabulary = true: it keeps the first {tokenizer.vocab_size} ids"
        raise UserError(
            f"{prefix}: built with another tokenizer than {whose}; build the corpus with --tokenizer {run}"
            f"{'' if fault else added}"
        )


def _fault(tokenizer: Tokenizer, corpus: Tokenizer | None) -> str | None:
    """What keeps the ids of one tokenizer from meaning the same in the corpus's."""
    if corpus is None:
        return "its own does not lie beside it to be compared"
    differs = tokenizer.first_difference(corpus)
    if differs is not None:
        there = tokenizer.piece(differs)
        here = corpus.piece(differs) if differs < corpus.vocab_size else None
        return f"the id {differs} is {there!r} there and {'none' if here is None else repr(here)} here"
    if tokenizer.end_of_document != corpus.end_of_document:
        return f"the id {tokenizer.end_of_document} closes documents there and {corpus.end_of_document} here"
    return None
