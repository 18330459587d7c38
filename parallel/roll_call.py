"""What ranks say to each other, through their store, when one of them has waited for too long.

The store answers while the process that keeps it runs, whatever its interpreter does: rank 0, or torch's
launcher where that lends its own. Every call is bounded, and None or less where there is no answer.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from queue import Empty, Queue
from typing import TypeVar

import torch.distributed as dist

from .failures import Failure, Kind

__all__ = ["GRACE", "RollCall"]

GRACE = 3.0
"""Seconds that the store has to answer, and that a rank which hangs gives the others to say where they
stand."""

POLL = 0.1

T = TypeVar("T")


class RollCall:
    """The ranks of this life."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self.world_size = rank, world_size
        borrowed = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # A store that rank 0 keeps is gone with it, and machines may count the lives differently.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if borrowed else "0"
        self._keys = f"plait/hang/{life}"
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self.keeper = (
            f"the launcher's store at {where}" if borrowed else "rank 0, which keeps the ranks' store,"
        )
        self._store: dist.TCPStore | None = None
        self._deaf = False

    def called(self) -> bool:
        """Whether a rank has spoken. A store that once gave no answer is not asked again."""
        return not self._deaf and self._count("spoken", 0) > 0

    def excuse(self, more: int) -> None:
        """One rank more, or one less, is busy with what no step's limit is for."""
        if not self._deaf:
            self._count("excused", more)

    def excused(self) -> bool:
        """Whether a rank is."""
        return not self._deaf and self._count("excused", 0) > 0

    def speak(self, failure: Failure) -> int:
        """Say where this rank stands; returns how many have spoken by now, or -1."""
        word = json.dumps(asdict(replace(failure, stacks="")))

        def say(store: dist.TCPStore) -> int:
            store.set(f"{self._keys}/{self._rank}", word)
            return store.add(f"{self._keys}/spoken", 1)

        return self._ask(say, -1)

    def await_all(self) -> None:
        """Wait for all ranks to speak, but not for long."""
        self._await("spoken", self.world_size)

    def heard(self) -> dict[int, Failure]:
        """What the ranks said that have spoken."""

        def read(store: dist.TCPStore) -> dict[int, Failure]:
            said = {}
            for rank in range(self.world_size):
                if store.check([key := f"{self._keys}/{rank}"]):
                    record = json.loads(store.get(key))
                    said[rank] = Failure(**{**record, "kind": Kind(record["kind"])})
            return said

        return self._ask(read, {})

    def tell(self) -> None:
        """All that was said is read; the store is needed no longer."""
        self._count("told", 1)

    def await_told(self) -> None:
        """Keep the store alive until one has read it, but not for long."""
        self._await("told", 1)

    def _await(self, name: str, goal: int) -> None:
        deadline = time.monotonic() + GRACE
        while 0 <= self._count(name, 0) < goal and time.monotonic() < deadline:
            time.sleep(POLL)

    def _count(self, name: str, more: int) -> int:
        return self._ask(lambda store: store.add(f"{self._keys}/{name}", more), -1)

    def _ask(self, question: Callable[[dist.TCPStore], T], silence: T) -> T:
        if self.world_size == 1:
            return silence
        answers: Queue[T] = Queue()

        def ask() -> None:
            with suppress(KeyError, RuntimeError):
                # A client of its own: the process group's may be held by the call that hangs.
                self._store = self._store or dist.TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=GRACE),
                )
                answers.put(question(self._store))

        # A store whose process is stopped takes the call and keeps whoever waits for it, without end.
        thread = threading.Thread(target=ask, name="plait-roll-call", daemon=True)
        thread.start()
        thread.join(GRACE)
        try:
            return answers.get_nowait()
        except Empty:
            # A late answer would be taken for that to the next question.
            self._store, self._deaf = None, True
            return silence
