"""Text as its ids come, never half a character."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["TextStream"]

REPLACEMENT = "\ufffd"

CONTEXT = 8
"""Ids before the new ones that are decoded with them, since a tokenizer may treat a text's first
piece in another way than the same piece inside."""


class Decoder(Protocol):
    """What a tokenizer does for us."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Turns ids into text, piece by piece; the pieces together are what decoding all ids gives.

    A character of several bytes may come as several ids. Until its last one is there, decoding gives
    replacement characters at the end, at most three of them; they are held back.

    Args:
        before: ids that stand before the first, such as the prompt's; their text is not repeated.
    """

    def __init__(self, tokenizer: Decoder, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-CONTEXT:])
        self._given = len(self._decode())

    def push(self, token: int) -> str:
        """The text that this id settles; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        settled = max(len(whole), len(text) - 3)
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text) and len(self._ids) > 2 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._given = len(self._decode())
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._decode()[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids)
