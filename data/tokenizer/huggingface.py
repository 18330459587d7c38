"""The Hugging Face kind: a folder with tokenizer.json, as `save_pretrained` and the hub's models have it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ...errors import UserError
from .interface import Tokenizer

__all__ = ["FILES", "FOLDER", "HuggingFaceTokenizer"]

FOLDER = "tokenizer"

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What decides ids, the end of a document and how transformers loads it; the first must be there."""

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the eos token that its neighbours name as the end of a document.

    What a text spells is text, also the names of special tokens; no template is applied, nothing is
    padded or cut.

    Raises:
        UserError: files that are damaged, that name no eos token, or one that has no id.
    """

    kind = "huggingface"
    folder = FOLDER

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        super().__init__(files, path)
        settings = {name: _json(content, path / name) for name, content in self.files.items()}
        end, special = _special_tokens(settings, path)
        self._tokenizer = _open(settings[FILES[0]], special, path)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        found = self._tokenizer.token_to_id(end)
        if found is None:
            raise UserError(f"{path}: its eos_token {end!r} is no token of tokenizer.json; name one that is")
        self.end_of_document = found
        for text in (end, f"{end}{end}", f"a {end} b", f"a{end}\n"):
            if found in self.encode(text):
                raise UserError(
                    f"{path}: its model has the eos_token {end!r} among its pieces, so that a text could "
                    "end a document by spelling it; take a tokenizer that keeps it apart"
                )

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        # The library takes all cores, or one where TOKENIZERS_PARALLELISM=false, whatever is asked here.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        # Ids may have holes.
        return self._tokenizer.id_to_token(token) or ""


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, perhaps cut off; copy the tokenizer again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no object with a tokenizer's keys; copy the tokenizer again")
    return tree


def _special_tokens(settings: Mapping[str, dict[str, Any]], path: Path) -> tuple[str, set[str]]:
    """The eos token and all special ones, as the files beside tokenizer.json name them."""
    named: dict[str, str] = {}
    for name in reversed(FILES[1:]):
        tree = settings.get(name, {})
        named |= {key: text for key in SPECIAL_KEYS if (text := _text(tree.get(key)))}
    if "eos_token" not in named:
        raise UserError(
            f"{path}: no tokenizer_config.json or special_tokens_map.json here names an eos_token, which "
            'closes documents; add "eos_token" to tokenizer_config.json'
        )
    return named["eos_token"], set(named.values())


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _open(tree: dict[str, Any], special: set[str], path: Path) -> tokenizers.Tokenizer:
    # A special token that tokenizer.json lists as an ordinary one would be found in texts.
    listed = tree.get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and token.get("content") in special:
            token["special"] = True
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
    # The library raises Exception itself, and its Rust side panics on some files.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path / FILES[0]}: not a tokenizer that can be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
