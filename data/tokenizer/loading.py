"""From a path to a tokenizer."""

from pathlib import Path

from ...errors import UserError
from .huggingface import FILES, FOLDER, HuggingFaceTokenizer
from .interface import Tokenizer
from .sentencepiece import MODEL_FILE, SentencePieceTokenizer

__all__ = ["find_tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: a sentencepiece model file, a folder with a Hugging Face tokenizer.json, or the folder of
            a corpus or a run that holds either.

    Raises:
        UserError: none is there, it is damaged, or it has no end-of-document id.
    """
    path = Path(path)
    if path.is_dir() and not (path / FILES[0]).is_file():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(f"{path}: no {FILES[0]} lies in this folder; name a tokenizer's file or folder")
        return load_tokenizer(found)
    try:
        if not path.is_dir():
            return SentencePieceTokenizer({MODEL_FILE: path.read_bytes()}, path)
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    except OSError as error:
        raise UserError(f"{path}: no tokenizer can be read here: {error.strerror}") from None
    return HuggingFaceTokenizer(files, path)


def find_tokenizer(folder: str | Path) -> Path | None:
    """The tokenizer in the folder of a corpus or a run, as :func:`load_tokenizer` takes it; None
    where there is none."""
    model, directory = Path(folder) / MODEL_FILE, Path(folder) / FOLDER
    if model.is_file():
        return model
    return directory if (directory / FILES[0]).is_file() else None
