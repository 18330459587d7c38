"""Corpora: where text comes from. Documents are streamed; a corpus never sits in memory."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .compression import COMPRESSED_SUFFIXES, open_bytes, plain_suffix
from .documents import Document, Keys
from .rows import HUB, check_hub, dataset_documents, hub_documents, jsonl_documents, parquet_documents

__all__ = ["STDLIB", "Corpus"]

STDLIB = "stdlib"
"""The name of the embedded corpus: the source of this Python's own standard library."""

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
PARQUET_SUFFIX = ".parquet"
# A .json file in a folder is more often settings than lines; named by itself it is taken for lines.
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES[:2], PARQUET_SUFFIX)
# Installed packages are no part of the standard library; its tests are data and repetition, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
LARGEST_TEXT_FILE = 2**31


class Corpus:
    """Documents from one or more sources, in a fixed order, as often as asked.

    Args:
        sources: each one of

            - ``"stdlib"``;
            - a file: ``*.jsonl``, ``*.ndjson`` or ``*.json``, a document a line; ``*.parquet``, a
              document a row; any other, one document, with line ends read as newlines. All but Parquet
              also as ``.gz``, ``.bz2``, ``.xz`` or ``.zst``;
            - a dataset that the `datasets` library saved to disk, a document a row;
            - a folder, searched to the bottom for datasets and ``*.txt, *.md, *.py, *.rst, *.jsonl,
              *.ndjson, *.parquet``;
            - ``"hub:OWNER/NAME[:CONFIG][@SPLIT]"``, streamed from the Hugging Face hub.
        keys: where the rows hold their text.

    Raises:
        UserError: no source, a missing path, a folder without such files, a hub out of reach.
    """

    def __init__(self, sources: Sequence[str], keys: Keys | str = "text") -> None:
        if not sources:
            raise UserError("no corpus was named; give 'stdlib', a file or a folder")
        self.keys = Keys(keys) if isinstance(keys, str) else keys
        self.sources = list(sources)
        self.files = {source: _files(source) for source in sources}

    def __iter__(self) -> Iterator[str]:
        """The texts, each with its prompt before it; see :meth:`documents`."""
        for document in self.documents():
            yield document.prompt + document.text

    def documents(self) -> Iterator[Document]:
        """The documents; empty ones are left out, and lone surrogates become U+FFFD.

        Raises:
            UserError: a file that is damaged or not UTF-8, a row without a string under the keys, or no
                document at all.
        """
        empty = True
        for source, files in self.files.items():
            for file in files:
                for document in self._documents(source, file):
                    if document.text or document.prompt:
                        empty = False
                        yield document
        if empty:
            raise UserError(
                f"{', '.join(self.sources)}: holds no text; name a corpus with some documents in it"
            )

    @property
    def description(self) -> list[str]:
        """What the corpus is, for the manifest: one line a source."""
        return [_describe(source, files) for source, files in self.files.items()]

    def _documents(self, source: str, file: Path) -> Iterator[Document]:
        if source.startswith(HUB):
            yield from hub_documents(source, self.keys)
        elif source == STDLIB:
            yield from _python_source(file)
        elif file.is_dir():
            yield from dataset_documents(file, self.keys)
        elif plain_suffix(file) in JSONL_SUFFIXES:
            yield from jsonl_documents(file, self.keys)
        elif file.suffix.lower() == PARQUET_SUFFIX:
            yield from parquet_documents(file, self.keys)
        else:
            yield _whole_file(file)


def _files(source: str) -> list[Path]:
    """What a source is read from, in order: files, and folders of saved datasets."""
    if source.startswith(HUB):
        check_hub(source)
        return [Path(source)]
    if source == STDLIB:
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        hub = f" (a dataset of the hub is {HUB}{source})" if source.count("/") == 1 else ""
        raise UserError(f"{source}: no such file or folder{hub}; a corpus is 'stdlib', a file or a folder")
    if (path / "dataset_dict.json").is_file():
        return [_train_split(path)]
    files = sorted(_search(path))
    if not files:
        shown = ", ".join("*" + suffix for suffix in FOLDER_SUFFIXES)
        raise UserError(f"{source}: no {shown} file and no saved dataset lies in this folder")
    return files


def _search(folder: Path) -> Iterator[Path]:
    for name, subfolders, names in os.walk(folder):
        here = Path(name)
        if _is_saved_dataset(here):
            subfolders.clear()
            yield here
            continue
        for path in (here / name for name in names):
            parquet_inside = (
                path.suffix.lower() in COMPRESSED_SUFFIXES and plain_suffix(path) == PARQUET_SUFFIX
            )
            if plain_suffix(path) in FOLDER_SUFFIXES and not parquet_inside and path.is_file():
                yield path


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _train_split(folder: Path) -> Path:
    """Of a saved dataset of several splits."""
    splits = sorted(path.name for path in folder.iterdir() if _is_saved_dataset(path))
    if "train" in splits or len(splits) == 1:
        return folder / ("train" if "train" in splits else splits[0])
    shown = ", ".join(splits) or "nothing that is whole"
    raise UserError(f"{folder}: holds the splits {shown}; name the folder of one, such as {folder}/SPLIT")


def _stdlib_files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        # _sysconfigdata_* is written when Python is built and differs from machine to machine.
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return sorted(files)


def _python_source(file: Path) -> Iterator[Document]:
    try:
        yield Document(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return


def _whole_file(file: Path) -> Document:
    with open_bytes(file) as stream:
        content = stream.read(LARGEST_TEXT_FILE + 1)
        if len(content) > LARGEST_TEXT_FILE:
            raise UserError(f"{file}: more than 2 GiB as one document; cut it up, or make it JSONL")
        return Document(content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"))


def _describe(source: str, files: list[Path]) -> str:
    if source.startswith(HUB):
        return source
    if source == STDLIB:
        return f"stdlib of Python {sysconfig.get_python_version()} ({len(files)} files)"
    return f"{source} ({len(files)} {'file' if len(files) == 1 else 'files'})"
