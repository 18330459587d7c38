"""How a shard's SSM state reaches the shards of the same sequence that come after it.

A shard does to the state that enters it ``h -> exp(a) h + F``, and two shards one after the other do
``(a1, F1) o (a2, F2) = (a1 + a2, exp(a2) F1 + F2)``. What enters a shard is the exclusive prefix of
these over the shards before it; in the backward, the gradient of what leaves a shard is the exclusive
suffix over those after it. A document that starts in a shard has ``a = -inf``: nothing passes it.

With R ranks and a state of S bytes a rank sends, whatever the sequence's length,

    ring    S                   in R - 1 hops one after the other
    gather  (R - 1) (S + a)     in one all-gather
    scan    log2(R) (S + a)     in ceil(log2 R) rounds of recursive doubling

at most. All are launched by `exchange` and waited for later. The hops of ring and scan are driven by a
thread on the CPU and by a stream of their own on a GPU, so that they go on while others compute.

Shapes: B batch, H heads, P head dim, N state size, R ranks.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import start_gather
from .ledger import Entry
from .mesh import Axis, Mesh

__all__ = ["EXCHANGES", "StateExchange", "choose_exchange"]

EXCHANGES = ("ring", "gather", "scan")

MOST_GATHERED = 16
"""Ranks up to which auto takes one all-gather: beyond, its volume outgrows the rounds of a scan."""


def choose_exchange(kind: str, ranks: int) -> str:
    """What ``auto`` means for a number of ranks: ring for two, gather to 16, scan beyond."""
    if kind != "auto":
        return kind
    return "ring" if ranks <= 2 else "gather" if ranks <= MOST_GATHERED else "scan"


class StateExchange:
    """The exchange of one layer in one micro-batch, in the sense of `plait.kernels.ssd.Exchange`.

    What arrived in the forward is kept, so that a layer that is computed again for its backward finds
    it here and nothing is sent twice.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._axis = mesh.states
        self._kind = choose_exchange(mesh.state_exchange, self._axis.size)
        self._layer: int | None = None
        self._arrived: Tensor | None = None

    def __call__(self, log_decay_BH: Tensor, state_BHPN: Tensor, *, reverse: bool) -> Callable[[], Tensor]:
        """Send this shard's, and return the function that waits for what enters it.

        Args:
            log_decay_BH: its total, -inf where a document starts in the shard.
            state_BHPN: from zero, at its end; with `reverse` its gradient's, at its beginning.
            reverse: from the shards after this one.
        """
        shard = _Shard(log_decay_BH.detach(), state_BHPN.detach())
        if reverse:
            return _launch(self._axis, self._kind, shard, reverse, self._layer)
        if self._arrived is not None:
            arrived = self._arrived
            return lambda: arrived
        self._layer = self._axis.layer
        wait = _launch(self._axis, self._kind, shard, reverse, self._layer)

        def keep() -> Tensor:
            self._arrived = wait()
            return self._arrived

        return keep


class _Shard:
    """What a run of shards does to the state that enters the first of them."""

    def __init__(self, a_BH: Tensor, F_BHPN: Tensor) -> None:
        self.a, self.F = a_BH, F_BHPN

    def after(self, h_BHPN: Tensor) -> Tensor:
        """The state that leaves, where h enters."""
        return torch.addcmul(self.F, torch.exp(self.a)[..., None, None], h_BHPN)

    def pack(self) -> Tensor:
        """(B, H, P N + 1), so that one message carries both."""
        return torch.cat([self.F.flatten(2), self.a[..., None]], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor, like: Tensor) -> "_Shard":
        return cls(packed[..., -1], packed[..., :-1].unflatten(-1, like.shape[2:]))


def _launch(axis: Axis, kind: str, shard: _Shard, reverse: bool, layer: int | None) -> Callable[[], Tensor]:
    direction = "backward" if reverse else "forward"
    place = axis.size - 1 - axis.place if reverse else axis.place
    if kind == "gather":
        packed_RBHx, sent = start_gather(shard.pack(), axis, layer, direction, "state_gather")

        def finish() -> Tensor:
            sent.wait()
            ranks = packed_RBHx.flip(0) if reverse else packed_RBHx
            return _prefix([_Shard.unpack(one, shard.F) for one in ranks[:place]], shard.F)

        return finish
    entry = None
    if axis.ledger is not None:
        entry = axis.ledger.launch(axis.name, f"state_{kind}", 0, layer, direction)
    line = _Line(axis, place, reverse, entry)
    travel = _ring if kind == "ring" else _scan
    arrival = _in_background(lambda: travel(line, shard), shard.F.device)

    def wait() -> Tensor:
        with axis.waits:
            arrived = arrival()
        if entry is not None and axis.ledger is not None:
            axis.ledger.wait(entry)
        return arrived

    return wait


def _prefix(shards: list[_Shard], like: Tensor) -> Tensor:
    state = torch.zeros_like(like)
    for shard in shards:
        state = shard.after(state)
    return state


class _Line:
    """The ranks of an axis in the order in which states travel: upwards, or downwards in the backward."""

    def __init__(self, axis: Axis, place: int, reverse: bool, entry: Entry | None) -> None:
        self.axis, self.place, self.size, self._reverse, self._entry = (
            axis,
            place,
            axis.size,
            reverse,
            entry,
        )

    def _rank(self, place: int) -> int:
        return self.axis.rank_at(self.size - 1 - place if self._reverse else place)

    def start_send(self, tensor: Tensor, place: int) -> dist.P2POp:
        if self._entry is not None:
            self._entry.sent += tensor.nbytes
        return dist.P2POp(dist.isend, tensor, self._rank(place), self.axis.group)

    def start_receive(self, tensor: Tensor, place: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, tensor, self._rank(place), self.axis.group)


def _do(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _ring(line: _Line, shard: _Shard) -> Tensor:
    """Each waits for its predecessor's final state and sends its own on."""
    state = torch.zeros_like(shard.F, memory_format=torch.contiguous_format)
    if line.place > 0:
        _do([line.start_receive(state, line.place - 1)])
    if line.place < line.size - 1:
        _do([line.start_send(shard.after(state).contiguous(), line.place + 1)])
    return state


def _scan(line: _Line, shard: _Shard) -> Tensor:
    """In round k each sends what it knows to the rank 2^k further, and so comes to know twice as many.

    `run` covers the shards up to this one, `entering` those before it.
    """
    run = shard
    entering = _Shard(torch.zeros_like(shard.a), torch.zeros_like(shard.F))
    step = 1
    while step < line.size:
        operations = []
        if line.place + step < line.size:
            operations.append(line.start_send(run.pack(), line.place + step))
        packed = None
        if line.place >= step:
            packed = shard.F.new_empty(*shard.a.shape, shard.F[0, 0].numel() + 1)
            operations.append(line.start_receive(packed, line.place - step))
        _do(operations)
        if packed is not None:
            before = _Shard.unpack(packed, shard.F)
            run = _Shard(before.a + run.a, run.after(before.F))
            entering = _Shard(before.a + entering.a, entering.after(before.F))
        step *= 2
    return entering.F


_threads = threading.local()
_courier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plait-states")
"""One thread, so that exchanges happen in the order they were launched in, which is the same on all ranks."""


def _in_background(travel: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Start what sends, receives and computes; returns the function that waits for its result."""
    if device.type != "cuda":
        # Grad mode is a thread's own; nothing here is differentiated.
        return _courier.submit(torch.no_grad()(travel)).result
    stream = getattr(_threads, "stream", None) or torch.cuda.Stream(device)
    _threads.stream = stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        arrived = travel()

    def wait() -> Tensor:
        torch.cuda.current_stream(device).wait_stream(stream)
        arrived.record_stream(torch.cuda.current_stream(device))
        return arrived

    return wait
