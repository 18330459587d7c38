"""Documents to tokens, in batches, in this process or several; the order and the ids are the same.

documents --batches--> encode --> Encoded, Encoded, …      workers = 1: here, on all cores by threads
             |-------> process --|                         workers > 1: N processes, each one core
             |-------> process --|
"""

import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from subprocess import Popen, TimeoutExpired
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .documents import Document
from .tokenizer import Tokenizer

__all__ = ["Encoded", "Encoder", "encode_documents", "serve"]

BATCH_CHARACTERS = 2**18
BATCH_DOCUMENTS = 1024
# Batches that may be done or under way before the oldest of them is.
BATCHES_AHEAD = 4


class Encoded(NamedTuple):
    """A batch of documents as tokens.

    tokens: (tokens,) in the shards' dtype, one document after the other, each with its end.
    lengths: int64 (documents,), tokens of each.
    prompts: int64 (documents,), how many of them are the prompt's, at the beginning.
    text_bytes: int64 (documents,), UTF-8 bytes of prompt and text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    text_bytes: np.ndarray


class Encoder(NamedTuple):
    """What turns documents into tokens: a tokenizer and the dtype of the shards."""

    tokenizer: Tokenizer
    dtype: type[np.integer]

    def encode(self, documents: list[Document], num_threads: int | None = None) -> Encoded:
        parts = [part for document in documents for part in (document.prompt, document.text)]
        ids = self.tokenizer.encode_batch(parts, num_threads)
        prompts = np.array([len(part) for part in ids[::2]], dtype=np.int64)
        lengths = prompts + np.array([len(part) + 1 for part in ids[1::2]], dtype=np.int64)
        tokens = np.empty(int(lengths.sum()), dtype=self.dtype)
        place = 0
        for prompt, text in zip(ids[::2], ids[1::2], strict=True):
            end = place + len(prompt) + len(text)
            tokens[place:end] = [*prompt, *text]
            tokens[end] = self.tokenizer.end_of_document
            place = end + 1
        text_bytes = np.array([len(part.encode()) for part in parts], dtype=np.int64)
        return Encoded(tokens, lengths, prompts, text_bytes[::2] + text_bytes[1::2])


def encode_documents(
    documents: Iterable[Document | str], encoder: Encoder, workers: int = 1
) -> Generator[Encoded, None, None]:
    """The documents in their order, whatever the number of workers.

    Closing the iterator ends the processes; so does the death of this one, whatever it dies of.

    Args:
        documents: read in this process; a str is a document without a prompt.
        workers: 1 encodes here, with threads on all cores; more starts so many processes.

    Raises:
        UserError: a process that encodes died.
    """
    batches = _batches(documents)
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    with _processes(encoder, workers) as started:
        yield from _in_order(batches, started)


def _batches(documents: Iterable[Document | str]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        document = Document(document) if isinstance(document, str) else document
        batch.append(document)
        characters += len(document.text) + len(document.prompt)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_order(batches: Iterator[list[Document]], workers: dict[Connection, Popen]) -> Iterator[Encoded]:
    idle, at_work, done = list(workers), {}, {}
    ahead = BATCHES_AHEAD * len(workers)
    numbered = enumerate(batches)
    following, wanted = next(numbered, None), 0
    while following or at_work:
        if following and idle and following[0] < wanted + ahead:
            number, batch = following
            connection = idle.pop()
            with _lively(workers[connection]):
                connection.send(batch)
            at_work[connection] = number
            following = next(numbered, None)
            continue
        for connection in wait(list(at_work)):
            assert isinstance(connection, Connection)
            with _lively(workers[connection]):
                result = connection.recv()
            if isinstance(result, Exception):
                raise result
            done[at_work.pop(connection)] = result
            idle.append(connection)
        while wanted in done:
            yield done.pop(wanted)
            wanted += 1


@contextmanager
def _lively(process: Popen) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        with suppress(TimeoutExpired):
            process.wait(1)
        code = process.returncode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise UserError(
            f"a process that tokenizes died ({how}), so the build ended; free some memory or lower --workers"
        ) from None


@contextmanager
def _processes(encoder: Encoder, workers: int) -> Iterator[dict[Connection, Popen]]:
    """Processes by the connection to each.

    They are fresh interpreters: a fork would copy the locks of this one's threads, perhaps held, and
    multiprocessing's own fresh ones would run the user's script again.
    """
    started: dict[Connection, Popen] = {}
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            call = f"from {__name__} import serve; serve({theirs.fileno()})"
            command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {call}"]
            # A group of its own does not get a terminal's Ctrl-C: this process gets it, and ends the rest.
            started[ours] = Popen(command, pass_fds=[theirs.fileno()], process_group=0)
            theirs.close()
        for connection, process in started.items():
            with _lively(process):
                connection.send(encoder)
        yield started
    finally:
        for connection, process in started.items():
            connection.close()
            process.kill()
            process.wait()


def serve(descriptor: int) -> None:
    """In a process of its own: encode batches until the other side of the connection is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        encoder: Encoder = connection.recv()
        while True:
            batch = connection.recv()
            try:
                result = encoder.encode(batch, num_threads=1)
            except Exception as error:
                result = error
            connection.send(result)
