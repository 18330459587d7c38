"""Where the nodes of a self-test meet: who came, how far their clocks are apart, how fast neighbours sum.

Place 0 holds the store. It waits for the others, and then tells all who is there, so that nobody waits for a
neighbour that did not come. Each round pairs every node with one neighbour.

Only the first process of a node speaks for it; the others come in for the sums.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from .report import Clock, Link

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["Meeting", "rounds"]

ARRIVAL = 0.6
"""Of the patience that is left at the meeting: how long place 0 waits for the others."""

LINK_SECONDS = 15.0
"""A neighbour that does not answer for so long does not."""

LEAST = 0.01
"""Seconds to wait for anything, were the deadline over."""

PINGS = 5

BURSTS = 4

BURST_SECONDS = 0.3

MOST_SUMS = 1000
"""All-reduces of a burst."""


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on the ring, by place, such that no node is in two pairs of a round."""
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    ring = [(place, (place + 1) % nodes) for place in range(nodes)]
    # A ring of odd length has one pair that is in the way of both others.
    even = ring[: nodes - nodes % 2]
    return [even[::2], even[1::2], *([ring[-1:]] if nodes % 2 else [])]


class Meeting:
    """One process at the meeting.

    Args:
        place, of: this node's, and how many nodes there are.
        node: its name.
        index: of this process's device among the node's.
        endpoint: HOST:PORT, where place 0 holds the store.
        deadline: by `time.monotonic`.

    Raises:
        RuntimeError: the store cannot be held, or not be reached, in time.
    """

    def __init__(self, place: int, of: int, node: str, index: int, endpoint: str, deadline: float) -> None:
        self.place, self.of, self.node, self.index, self.deadline = place, of, node, index, deadline
        self._host, _, port = endpoint.rpartition(":")
        self._port = int(port)
        self._holds = place == 0 and index == 0
        self._arrival = time.monotonic() + ARRIVAL * self._left()
        self.session = ""
        self.names: list[str | None] = [None] * of
        self._store = self._join(self._holds)
        if self._holds:
            threading.Thread(target=self._tell_the_time, name="plait-clock", daemon=True).start()

    def assemble(self) -> None:
        """Learn who is there.

        Raises:
            RuntimeError: place 0 did not tell in time, or told without this node.
        """
        if self.index == 0:
            self._store.set(f"here/{self.place}", self.node)
        if self._holds:
            self.names = [self._await(place) for place in range(self.of)]
            self.session = uuid.uuid4().hex
            self._store.set("meeting", json.dumps([self.session, self.names]))
        else:
            self._store.wait(["meeting"], timedelta(seconds=self._left()))
            self.session, self.names = json.loads(self._store.get("meeting"))
        if self.names[self.place] != self.node:
            there = self.names[self.place]
            raise RuntimeError(
                f"{there} is at place {self.place} too" if there else "it came when the others had begun"
            )

    def clock(self) -> Clock:
        """By Cristian's method, from the ping with the shortest way there and back."""
        best: tuple[float, float] | None = None
        for _ in range(PINGS if self.place else 0):
            began, sent = time.perf_counter(), time.time()
            number = self._store.add("pings", 1)
            self._store.set(f"ping/{number}", "")
            self._store.wait([f"pong/{number}"], timedelta(seconds=self._left()))
            theirs = float(self._store.get(f"pong/{number}"))
            half = (time.perf_counter() - began) / 2
            if best is None or half < best[0]:
                best = half, sent + half - theirs
        return Clock(best[1], best[0]) if best else Clock(0.0, 0.0)

    def links(self, device: "torch.device") -> Iterator[Link]:
        """The sums with each neighbour that is there, as they come."""
        for pairs in rounds(self.of):
            for pair in pairs:
                other = pair[1 - pair.index(self.place)] if self.place in pair else None
                if other is None or (name := self.names[other]) is None:
                    continue
                try:
                    yield Link(name, self._sum_with(pair, device))
                # Whatever a backend says of a link that does not work.
                except Exception as error:
                    yield Link(name, failed=" ".join(str(error).split())[:200])

    def leave(self) -> None:
        """Say for this node that all its processes are through; whoever holds the store stays until all nodes
        that are there have said so."""
        self._store.add("left", 1)
        there = sum(name is not None for name in self.names)
        while self._holds and self._store.add("left", 0) < there and self._left() > LEAST:
            time.sleep(0.05)

    def _left(self) -> float:
        return max(LEAST, self.deadline - time.monotonic())

    def _join(self, holds: bool = False) -> "dist.TCPStore":
        import torch.distributed as dist

        return dist.TCPStore(
            self._host,
            self._port,
            is_master=holds,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._left()),
        )

    def _await(self, place: int) -> str | None:
        """The name of the node at a place; None where it does not come."""
        key = f"here/{place}"
        patience = max(LEAST, self._arrival - time.monotonic())
        with suppress(RuntimeError):
            self._store.wait([key], timedelta(seconds=patience))
            return self._store.get(key).decode()
        return None

    def _tell_the_time(self) -> None:
        """Answer pings, in their order, as long as this process lives."""
        store, number = self._join(), 1
        while True:
            try:
                store.wait([f"ping/{number}"], timedelta(seconds=1))
            except RuntimeError:
                # Whoever took the number and then died is passed over.
                if store.add("pings", 0) < number:
                    continue
            store.set(f"pong/{number}", repr(time.time()))
            number += 1

    def _sum_with(self, pair: tuple[int, int], device: "torch.device") -> float:
        """GB/s of the tensor that both sum, in the best burst."""
        import torch
        import torch.distributed as dist

        x = torch.ones(1 << (26 if device.type == "cuda" else 22), device=device)
        with self._group(pair, device):

            def seconds(times: int) -> float:
                began = time.perf_counter()
                for _ in range(times):
                    dist.all_reduce(x, op=dist.ReduceOp.MAX)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                return time.perf_counter() - began

            # The first one connects.
            seconds(1)
            times = torch.tensor(BURST_SECONDS / seconds(1), device=device)
            dist.all_reduce(times, op=dist.ReduceOp.MIN)
            count = min(MOST_SUMS, max(1, round(times.item())))
            return x.nbytes * count / min(seconds(count) for _ in range(BURSTS)) / 1e9

    @contextmanager
    def _group(self, pair: tuple[int, int], device: "torch.device") -> Iterator[None]:
        import torch.distributed as dist

        gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore(f"link/{pair[0]}-{pair[1]}/{self.index}", self._store),
            rank=pair.index(self.place),
            world_size=2,
            timeout=timedelta(seconds=min(LINK_SECONDS, self._left())),
            device_id=device if gpu else None,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
