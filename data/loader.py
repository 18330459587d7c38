"""The loader: batches read ahead in a background thread."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import numpy as np

from .mixture import Plan
from .shards import Shard
from .window import batch

__all__ = ["Loader"]

Batch = dict[str, np.ndarray]

# How often a thread that has read far enough ahead looks whether it should end.
POLL_SECONDS = 0.1


class Loader:
    """Batches of consecutive samples from a cursor on, a few of them read ahead.

    Args:
        plan: the order.
        shards: by prefix, those the plan reads from the cursor on.
        cursor: samples consumed so far; the first batch begins there.
        batch_size: samples a batch, over all ranks.
        rows: this rank's part of each batch; all of it by default.
        isolate_documents: as for :func:`plait.data.window.window`.
        prefetch: batches to read ahead.

    Attributes:
        cursor: samples consumed, over all ranks: those of the batches that :meth:`next` gave out.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[str, Shard],
        *,
        cursor: int,
        batch_size: int,
        rows: slice = slice(None),
        isolate_documents: bool = True,
        prefetch: int = 2,
    ) -> None:
        mine = range(batch_size)[rows]
        if not mine:
            raise ValueError(f"rows {rows} of a batch of {batch_size} are none")
        self.cursor = cursor
        self.batch_size = batch_size
        self._failure: BaseException | None = None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)

        def read(first: int) -> Batch:
            return batch(plan, shards, [first + row for row in mine], isolate_documents=isolate_documents)

        stop = threading.Event()
        # The thread knows the queue and not the loader, so that a loader that is dropped ends it.
        thread = threading.Thread(
            target=_read_ahead,
            args=(read, cursor, batch_size, self._queue, stop),
            name="plait-loader",
            daemon=True,
        )
        thread.start()
        self._finalizer = weakref.finalize(self, _end, thread, stop)

    def next(self) -> tuple[Batch, float]:
        """The next batch and the seconds that were spent waiting for it.

        Returns:
            batch: ``tokens`` and ``targets`` int64 (B, L), ``document_ids`` and ``positions`` int32
                (B, L), where B counts this rank's rows.
            waited: seconds; near zero when reading keeps up.

        Raises:
            RuntimeError: the loader is closed.
            Exception: whatever reading ahead ran into, now and at every later call.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the loader is closed")
        if self._failure is None:
            began = time.perf_counter()
            item = self._queue.get()
            waited = time.perf_counter() - began
            if not isinstance(item, BaseException):
                self.cursor += self.batch_size
                return item, waited
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """End the thread; also at the end of a ``with`` block, of the loader's life, or of Python."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_ahead(
    read: Callable[[int], Batch],
    cursor: int,
    batch_size: int,
    batches: "queue.Queue[Batch | BaseException]",
    stop: threading.Event,
) -> None:
    item: Batch | BaseException
    while not stop.is_set():
        try:
            item = read(cursor)
        except BaseException as error:
            item = error
        cursor += batch_size
        while not stop.is_set():
            try:
                batches.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    thread.join()
