"""Rows of files that hold many documents: JSON lines, Parquet, datasets saved to disk or on the hub.

Each function yields documents, and opens an error's line with the file and the row's place in it.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .compression import open_bytes
from .documents import Document, Keys, document_of, no_key

__all__ = ["check_hub", "dataset_documents", "hub_documents", "jsonl_documents", "parquet_documents"]

HUB = "hub:"
"""What a source on the hub begins with: hub:OWNER/NAME[:CONFIG][@SPLIT]."""

LARGEST_LINE = 2**30
BATCH_ROWS = 1024
HUB_TIMEOUT_SECONDS = 10.0


def jsonl_documents(file: Path, keys: Keys) -> Iterator[Document]:
    """The objects of a JSONL file, a line each; empty lines are passed over.

    Raises:
        UserError: a line that is not JSON or has no text under the keys, or a file that is damaged.
    """
    with open_bytes(file) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LARGEST_LINE), b""), start=1):
            where = f"{file}:{number}"
            if len(line) == LARGEST_LINE:
                raise UserError(f"{where}: a line of more than 1 GiB; cut the document up")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield document_of(_parsed(text, where), keys, where)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        shown = line[:60] + ("…" if len(line) > 60 else "")
        raise UserError(f"{where}: not JSON: {shown}; each line is one object") from None


def parquet_documents(file: Path, keys: Keys) -> Iterator[Document]:
    """The rows of a Parquet file; only the keys' columns are read.

    Raises:
        UserError: a file that is no Parquet or damaged, or no such column, or a row without a string.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _columns(table.schema_arrow.names, keys, str(file))
            yield from _documents(table.iter_batches(BATCH_ROWS, columns=columns), keys, str(file))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {_first_line(error)}; is it whole?") from None


def dataset_documents(folder: Path, keys: Keys) -> Iterator[Document]:
    """The rows of a dataset that the `datasets` library saved to disk.

    Raises:
        UserError: a folder that is damaged, or no such column, or a row without a string.
    """
    import pyarrow

    with _quiet_datasets() as datasets:
        try:
            table = datasets.Dataset.load_from_disk(str(folder))
            columns = _columns(table.column_names, keys, str(folder))
            tables = table.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)
            yield from _documents(tables, keys, str(folder))
        except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{folder}: cannot be read as a saved dataset: {_first_line(error)}; is it whole?"
            ) from None


def _columns(names: list[str], keys: Keys, where: str) -> list[str]:
    if keys.missing_from(names):
        raise no_key(names, keys, where)
    return [name for name in dict.fromkeys(keys.all()) if name in names]


def _documents(tables: Any, keys: Keys, where: str) -> Iterator[Document]:
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    for number, row in enumerate(rows, start=1):
        yield document_of(row, keys, f"{where}: row {number}")


def check_hub(source: str) -> None:
    """Ask the hub for a dataset once, so that a mistake shows at once and not after many retries.

    Raises:
        UserError: the hub cannot be reached, or has no such dataset.
    """
    import huggingface_hub

    name, _, _ = _parts(source)
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    # What the hub's library raises changes with its version and that of its HTTP client.
    except Exception as error:
        raise UserError(
            f"{source}: the hub did not give this dataset ({_first_line(error)}); check name, token and "
            "network, or bring the files here and name them"
        ) from None


def hub_documents(source: str, keys: Keys) -> Iterator[Document]:
    """The rows of a split of a dataset on the hub, streamed.

    Raises:
        UserError: a dataset that cannot be read, or a row without a string under the keys.
    """
    name, config, split = _parts(source)
    with _quiet_datasets() as datasets:
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            if rows.column_names:
                rows = rows.select_columns(_columns(rows.column_names, keys, source))
            for number, row in enumerate(rows, start=1):
                yield document_of(row, keys, f"{source}: row {number}")
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: cannot be read: {_first_line(error)}") from None


def _parts(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of hub:OWNER/NAME[:CONFIG][@SPLIT]."""
    name, _, split = source.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    return name, config or None, split or "train"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The datasets library without progress bars, log lines and the request by which it counts its
    uses over the network; its settings are put back after."""
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
