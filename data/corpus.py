"""Corpora: where text comes from. Documents are streamed as str; a corpus never sits in memory."""

import glob
import json
import logging
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["STDLIB", "Corpus"]

STDLIB = "stdlib"
"""The name of the embedded corpus: the source of this Python's own standard library."""

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
# Installed packages are no part of the standard library; its tests are data and repetition, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Arrow's strings have 31-bit offsets, and a file read as one document is one string.
LARGEST_TEXT_FILE = 2**31 - 1


class Corpus:
    """Documents from one or more sources, in a fixed order, as often as asked.

    Args:
        sources: each ``"stdlib"``, a file, or a folder that is searched to the bottom for
            ``*.txt, *.md, *.py, *.rst`` and ``*.jsonl`` (also ``.gz``, ``.bz2``, ``.xz``). A file
            is one document, with line ends read as newlines; a line of a JSONL file is one document.
        text_key: the key of a JSONL line that holds its text.

    Raises:
        UserError: no source, a missing path, a folder without such files.
    """

    def __init__(self, sources: Sequence[str], text_key: str = "text") -> None:
        if not sources:
            raise UserError("no corpus was named; give 'stdlib', a file or a folder")
        self.text_key = text_key
        self.sources = list(sources)
        self.files = {source: _files(source) for source in sources}

    def __iter__(self) -> Iterator[str]:
        """The documents; empty ones are left out, and lone surrogates become U+FFFD.

        Raises:
            UserError: a file that is not UTF-8, a JSONL line that is not JSON or has no text under
                the key, or no document at all.
        """
        empty = True
        for source, files in self.files.items():
            for file in files:
                for text in self._documents(source, file):
                    if text:
                        empty = False
                        yield _without_lone_surrogates(text)
        if empty:
            raise UserError(
                f"{', '.join(self.sources)}: holds no text; name a corpus with some documents in it"
            )

    @property
    def description(self) -> list[str]:
        """What the corpus is, for the manifest: one line a source."""
        return [_describe(source, files) for source, files in self.files.items()]

    def _documents(self, source: str, file: Path) -> Iterator[str]:
        if source == STDLIB:
            yield from _python_source(file)
        elif _plain_suffix(file) in JSONL_SUFFIXES:
            yield from _jsonl_documents(file, self.text_key)
        else:
            yield from _rows(file, sample_by="document")


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{source}: no such file or folder; a corpus is 'stdlib', a file or a folder")
    suffixes = (*TEXT_SUFFIXES, *JSONL_SUFFIXES[:2])
    files = sorted(p for p in path.rglob("*") if _plain_suffix(p) in suffixes and p.is_file())
    if not files:
        raise UserError(f"{source}: no {', '.join('*' + s for s in suffixes)} file lies in this folder")
    return files


def _stdlib_files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        # _sysconfigdata_* is written when Python is built and differs from machine to machine.
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return sorted(files)


def _python_source(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return


def _plain_suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _describe(source: str, files: list[Path]) -> str:
    if source == STDLIB:
        return f"stdlib of Python {sysconfig.get_python_version()} ({len(files)} files)"
    return f"{source} ({len(files)} {'file' if len(files) == 1 else 'files'})"


def _jsonl_documents(file: Path, key: str) -> Iterator[str]:
    # Lines are parsed here and not by the library's JSON reader: it guesses one schema for all
    # lines, fills a missing key with null and turns numbers into strings.
    for number, line in enumerate(_rows(file, sample_by="line", keep_linebreaks=True), start=1):
        line = line.removeprefix("\ufeff") if number == 1 else line
        if line.strip():
            yield _text_of(line, key, f"{file}:{number}")


def _text_of(line: str, key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON: {_shown(line.strip())}; each line is one object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {_shown(row)}, not an object with the key '{key}'")
    if key not in row:
        keys = ", ".join(f"'{name}'" for name in list(row)[:8]) or "none"
        raise UserError(
            f"{where}: no key '{key}' among its keys ({keys}); name the right one with --text-key"
        )
    if not isinstance(row[key], str):
        raise UserError(f"{where}: '{key}' is {_shown(row[key])}, not a string")
    return row[key]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _rows(file: Path, **options: Any) -> Iterator[str]:
    """The rows of one file through the datasets library, streaming."""
    if "::" in str(file):
        raise UserError(
            f"{file}: '::' in a path names a chain of archives to the datasets library; rename it"
        )
    if options["sample_by"] == "document" and file.stat().st_size > LARGEST_TEXT_FILE:
        raise UserError(f"{file}: more than 2 GiB as one document; cut it up, or make it JSONL")
    with _quiet_datasets() as datasets, tempfile.TemporaryDirectory(prefix="plait-datasets-") as cache:
        try:
            # The library takes a path for a pattern. Even a streaming read leaves lock files behind
            # in its cache, hence one of its own that goes with it.
            rows = datasets.load_dataset(
                "text",
                data_files=[glob.escape(str(file.absolute()))],
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
            for row in rows:
                yield row["text"]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error.reason}); convert it first") from None
        except (EOFError, OSError) as error:
            raise UserError(f"{file}: cannot be read: {error}; is it whole?") from None


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The datasets library without progress bars, log lines and the request by which it counts its
    uses over the network, even of local files; its settings are put back after."""
    import datasets
    from datasets import config
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled()
    counts = config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield datasets
    finally:
        datasets_logging.set_verbosity(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not bars:
            datasets.enable_progress_bars()


def _without_lone_surrogates(text: str) -> str:
    """JSON may spell half a surrogate pair, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
