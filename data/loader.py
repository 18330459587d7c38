"""The loader: batches read ahead by background threads, in the same order for any number of them."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

import numpy as np

from .plan import Plan
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
        cursor: the sample the first batch begins at, or, where that is left out, before.
        batch_size: samples a batch, over all ranks.
        rows: this rank's samples of each batch; all of it by default.
        isolate_documents: as for :func:`plait.data.window.window`.
        part: (lo, hi), this rank's tokens of each sample, as there; all of it by default.
        prefetch: batches that a thread reads ahead.
        workers: threads; each reads every so many-th batch.

    Attributes:
        cursor: the sample after those of the batches that :meth:`next` gave out, over all ranks.
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
        part: tuple[int, int] | None = None,
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        mine = range(batch_size)[rows]
        if not mine:
            raise ValueError(f"rows {rows} of a batch of {batch_size} are none")
        self.plan = plan
        self.cursor = cursor
        self.batch_size = batch_size
        self._failure: BaseException | None = None
        # Batch number k is thread k % workers' and comes through that thread's own queue.
        self._queues: list[queue.Queue[Batch | BaseException]] = [
            queue.Queue(maxsize=prefetch) for _ in range(workers)
        ]
        self._taken = 0

        def read(first: int) -> Batch:
            taken = plan.take(first, batch_size)
            indices = [taken[row] for row in mine]
            return batch(plan, shards, indices, isolate_documents=isolate_documents, part=part)

        stop = threading.Event()
        # The threads know the queues and not the loader, so that a loader that is dropped ends them.
        threads = [
            threading.Thread(
                target=_read_ahead,
                args=(
                    read,
                    _cursors(plan, plan.advance(cursor, worker * batch_size), workers * batch_size),
                    batches,
                    stop,
                ),
                name="plait-loader",
                daemon=True,
            )
            for worker, batches in enumerate(self._queues)
        ]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _end, threads, stop)

    def next(self) -> tuple[Batch, float]:
        """The next batch and the seconds that were spent waiting for it.

        Returns:
            batch: ``tokens`` and ``targets`` int64 (B, P), ``positions`` int32 (B, P) and
                ``document_ids`` int32 (B, L), where B counts this rank's rows, P the tokens of its
                part and L those of a window.
            waited: seconds; near zero when reading keeps up.

        Raises:
            RuntimeError: the loader is closed.
            Exception: whatever reading ahead ran into, now and at every later call.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the loader is closed")
        if self._failure is None:
            began = time.perf_counter()
            item = self._queues[self._taken % len(self._queues)].get()
            waited = time.perf_counter() - began
            self._taken += 1
            if not isinstance(item, BaseException):
                self.cursor = self.plan.advance(self.cursor, self.batch_size)
                return item, waited
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """End the threads; also at the end of a ``with`` block, of the loader's life, or of Python."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cursors(plan: Plan, cursor: int, samples: int) -> Iterator[int]:
    while True:
        yield cursor
        cursor = plan.advance(cursor, samples)


def _read_ahead(
    read: Callable[[int], Batch],
    cursors: Iterable[int],
    batches: "queue.Queue[Batch | BaseException]",
    stop: threading.Event,
) -> None:
    item: Batch | BaseException
    for cursor in cursors:
        if stop.is_set():
            return
        try:
            item = read(cursor)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                batches.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _end(threads: list[threading.Thread], stop: threading.Event) -> None:
    stop.set()
    for thread in threads:
        thread.join()
