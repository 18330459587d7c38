"""What a tokenizer is, whatever kind it has: ids of a text, text of ids, and the files it comes from."""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

__all__ = ["Kind", "Tokenizer", "write_whole"]

Kind = Literal["sentencepiece", "huggingface"]


class Tokenizer(ABC):
    """A tokenizer, made from the bytes of its files; pickles to those bytes.

    Args:
        files: name -> bytes, all that it needs, in a fixed order.
        path: the file or folder they were read from.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        path: as above.
        files: as above.
        vocab_size: ids are 0 … vocab_size - 1.
        end_of_document: the id that closes a document; no text encodes to it.
        fingerprint: SHA-256 in hex of the files' bytes, one after the other.
    """

    kind: ClassVar[Kind]
    folder: ClassVar[str]
    """Where in a corpus's or a run's folder its files lie."""
    vocab_size: int
    end_of_document: int

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        self.files = dict(files)
        self.path = path
        self.fingerprint = hashlib.sha256(b"".join(self.files.values())).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-document id; what spells that id's name is text."""
        return self.encode_batch([text], num_threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of several texts, as :meth:`encode` gives them, on all cores unless told otherwise."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids give nothing, bytes that are no UTF-8 give U+FFFD."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """What an id stands for, spelled as in the tokenizer's files."""

    def first_difference(self, other: "Tokenizer") -> int | None:
        """The first of this tokenizer's ids that stands for another piece in another one, or for none;
        None where that one has all of them, and perhaps more."""
        ids = range(self.vocab_size)
        return next((i for i in ids if i >= other.vocab_size or self.piece(i) != other.piece(i)), None)

    def save_into(self, folder: str | Path) -> None:
        """Write ``folder/tokenizer.model`` or ``folder/tokenizer/…``, which loads as this very tokenizer.

        Each file appears at once or not at all, the one that the tokenizer is found by last.
        """
        folder = Path(folder) / self.folder
        folder.mkdir(exist_ok=True)
        for name, content in reversed(self.files.items()):
            write_whole(folder / name, content)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[dict[str, bytes], Path]]:
        return type(self), (self.files, self.path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
