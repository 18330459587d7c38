"""Documents: what a row of a corpus becomes, and how much of it is trained on."""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..errors import UserError

__all__ = ["Document", "Keys", "Mask", "document_of", "no_key"]

Mask = Literal["prompt", "none"]


class Document(NamedTuple):
    """A text, and the prompt before it where the two came apart.

    The two are encoded apart, as they are when a model is given a prompt and goes on from there.
    """

    text: str
    prompt: str = ""


class Keys(NamedTuple):
    """Where a row holds its text, and whether a prompt is masked.

    A row has its text under ``text``, or prompt and completion under those keys. Where it has both,
    ``mask`` decides: with "prompt" it is prompt and completion, with "none" it is its text.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    mask: Mask = "none"

    def all(self) -> tuple[str, str, str]:
        return self.text, self.prompt, self.completion

    def missing_from(self, names: Mapping[str, Any] | list[str]) -> bool:
        """Whether a row or table with these keys has neither a text nor prompt and completion."""
        return self.text not in names and not (self.prompt in names and self.completion in names)


def document_of(row: Any, keys: Keys, where: str) -> Document:
    """The document of a row.

    Args:
        row: an object as JSON, Parquet or Arrow give it.
        where: file and place of the row, to open an error's line.

    Raises:
        UserError: no object, none of the keys, or a value that is no string.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {_shown(row)}, not an object with the key '{keys.text}'")
    pair = keys.prompt in row and keys.completion in row
    if pair and (keys.mask == "prompt" or keys.text not in row):
        text, prompt = (_string(row, key, where) for key in (keys.completion, keys.prompt))
        return Document(text, prompt)
    if keys.text not in row:
        raise no_key(list(row), keys, where)
    return Document(_string(row, keys.text, where))


def no_key(names: list[str], keys: Keys, where: str) -> UserError:
    """What to say where a row or a table lacks the keys."""
    shown = ", ".join(f"'{_without_lone_surrogates(name)}'" for name in names[:8]) or "none"
    if keys.mask == "prompt":
        return UserError(
            f"{where}: neither '{keys.prompt}' and '{keys.completion}' nor '{keys.text}' among its keys "
            f"({shown}); name the right ones with --prompt-key and --completion-key"
        )
    return UserError(
        f"{where}: no key '{keys.text}' among its keys ({shown}); name the right one with --text-key"
    )


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {_shown(value)}, not a string")
    return _without_lone_surrogates(value)


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=repr)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return _without_lone_surrogates(text[:60]) + ("…" if len(text) > 60 else "")


def _without_lone_surrogates(text: str) -> str:
    """JSON may spell half a surrogate pair, which no encoding can hold; it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
