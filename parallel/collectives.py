"""Collectives over an axis, each with its gradient; over an axis of one rank each is nothing at all.

Every message between ranks goes through here and into the axis's ledger, where one is kept. Tensors
are local ones. A collective's gradient is a collective too: what one gathers, the other scatters.

Bytes are counted as they leave a rank: with R ranks and a shard of S bytes, (R-1) S for an all-gather
and a reduce-scatter, 2 (R-1) S / R for an all-reduce of S bytes, what others get for an all-to-all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ledger import Direction, Entry
from .mesh import Axis

__all__ = [
    "Sent",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "exchange_neighbours",
    "gather_into",
    "gather_stacked",
    "launch",
    "reduce_scatter",
    "scatter_into",
    "start_all_to_all",
    "start_gather",
    "start_scatter",
    "start_swap",
    "sum_in_place",
]

# torch 2.13 renames them; 2.11 has the old names only.
gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sent:
    """A collective under way: `wait` for it before its result is read.

    Args:
        held: tensors that it reads from.
    """

    def __init__(
        self, works: Sequence[Any], axis: Axis, entry: Entry | None, held: Sequence[Tensor] = ()
    ) -> None:
        self._works, self._axis, self._entry, self._held = works, axis, entry, held

    def wait(self) -> None:
        with self._axis.waits:
            for work in self._works:
                if work is not None:
                    work.wait()
        self._works, self._held = (), ()
        if self._entry is not None and self._axis.ledger is not None:
            self._axis.ledger.wait(self._entry)


def launch(
    axis: Axis,
    kind: str,
    sent: int,
    start: Callable[[], Sequence[Any]],
    layer: int | None = None,
    direction: Direction | None = None,
    held: Sequence[Tensor] = (),
) -> Sent:
    """Start a collective and note it.

    Args:
        sent: bytes that leave this rank.
        start: returns torch's handles of what was started.
        held: tensors to keep until it is through.
        layer: None is the one being computed.
        direction: None is a forward one.
    """
    entry = None
    if axis.ledger is not None:
        layer = axis.layer if layer is None else layer
        entry = axis.ledger.launch(axis.name, kind, sent, layer, direction)
    return Sent(start(), axis, entry, held)


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' shards one after another along `dim`; the gradient is summed and scattered back."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The sum over ranks, of which each keeps its part along `dim`; the gradient is gathered.

    Raises:
        ValueError: the ranks do not divide the dim.
    """
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, of which each makes its own use: the gradient is summed too."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Rows to each rank and rows from each, in the order of ranks; the gradient goes the way back.

    Args:
        x: (sum of `send`, …).
        send, receive: rows to and from each rank; they may differ, and be none.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, axis, list(send), list(receive))


def start_gather(
    x: Tensor,
    axis: Axis,
    layer: int | None = None,
    direction: Direction | None = None,
    kind: str = "all_gather",
) -> tuple[Tensor, Sent]:
    """Start stacking the ranks' tensors along a new first dim; wait before they are read."""
    x = x.contiguous()
    out_Rx = x.new_empty(axis.size, *x.shape)
    sent = launch(
        axis,
        kind,
        (axis.size - 1) * x.nbytes,
        lambda: [gather_into(out_Rx.view(-1), x.view(-1), group=axis.group, async_op=True)],
        layer,
        direction,
        held=(x,),
    )
    return out_Rx, sent


def start_scatter(
    x_Rx: Tensor, axis: Axis, layer: int | None = None, direction: Direction | None = None
) -> tuple[Tensor, Sent]:
    """Start summing over ranks what each has for every rank: to each its own."""
    x_Rx = x_Rx.contiguous()
    out = x_Rx.new_empty(x_Rx.shape[1:])
    sent = launch(
        axis,
        "reduce_scatter",
        (axis.size - 1) * out.nbytes,
        lambda: [scatter_into(out.view(-1), x_Rx.view(-1), group=axis.group, async_op=True)],
        layer,
        direction,
        held=(x_Rx,),
    )
    return out, sent


def start_all_to_all(
    x: Tensor,
    axis: Axis,
    send: Sequence[int],
    receive: Sequence[int],
    layer: int | None = None,
    direction: Direction | None = None,
    kind: str = "all_to_all",
) -> tuple[Tensor, Sent]:
    """Start sending rows to each rank and taking rows from each: see `all_to_all`."""
    x = x.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:])
    row = math.prod(x.shape[1:]) * x.itemsize
    sent = launch(
        axis,
        kind,
        (sum(send) - send[axis.place]) * row,
        lambda: [dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group, async_op=True)],
        layer,
        direction,
        held=(x,),
    )
    return out, sent


def start_swap(
    x: Tensor,
    axis: Axis,
    partner: int,
    layer: int | None = None,
    direction: Direction | None = None,
) -> tuple[Tensor, Sent]:
    """Start exchanging this rank's tensor for that of the rank at `partner`, of the same shape."""
    x = x.contiguous()
    out = torch.empty_like(x)
    return out, exchange_neighbours(x, partner, out, partner, axis, "swap", layer, direction)


@torch.no_grad()
def gather_stacked(x: Tensor, axis: Axis) -> Tensor:
    """The ranks' tensors stacked along a new first dim, without a gradient."""
    if axis.size == 1:
        return x[None]
    out, sent = start_gather(x, axis)
    sent.wait()
    return out


@torch.no_grad()
def sum_in_place(x: Tensor, axis: Axis, layer: int | None = None) -> Tensor:
    """The sum over ranks, written into x, without a gradient.

    Args:
        layer: for the ledger, in a backward, which is of no layer by itself.
    """
    if axis.size > 1:
        _reduce(x, axis, layer).wait()
    return x


def exchange_neighbours(
    sent: Tensor | None,
    to: int,
    into: Tensor | None,
    source: int,
    axis: Axis,
    kind: str,
    layer: int | None = None,
    direction: Direction | None = None,
) -> Sent:
    """Start sending a contiguous tensor to one place of an axis and receiving one from another.

    Args:
        sent: None for a rank that sends nothing.
        into: None for a rank that receives nothing.
    """
    operations = []
    if sent is not None:
        operations.append(dist.P2POp(dist.isend, sent, axis.rank_at(to), axis.group))
    if into is not None:
        operations.append(dist.P2POp(dist.irecv, into, axis.rank_at(source), axis.group))
    return launch(
        axis,
        kind,
        sent.nbytes if sent is not None else 0,
        lambda: dist.batch_isend_irecv(operations) if operations else (),
        layer,
        direction,
        held=() if sent is None else (sent,),
    )


def _reduce(x: Tensor, axis: Axis, *where: Any) -> Sent:
    volume = 2 * (axis.size - 1) * x.nbytes // axis.size
    return launch(
        axis, "all_reduce", volume, lambda: [dist.all_reduce(x, group=axis.group, async_op=True)], *where
    )


def _gather_along(x: Tensor, axis: Axis, dim: int, *where: Any) -> Tensor:
    out, sent = start_gather(x, axis, *where)
    sent.wait()
    shape = list(x.shape)
    shape[dim] *= axis.size
    return out.movedim(0, dim).reshape(shape)


def _scatter_along(x: Tensor, axis: Axis, dim: int, *where: Any) -> Tensor:
    if x.shape[dim] % axis.size:
        raise ValueError(f"{axis.size} ranks of {axis.name} do not divide dim {dim} of {tuple(x.shape)}")
    out, sent = start_scatter(x.unflatten(dim, (axis.size, -1)).movedim(dim, 0), axis, *where)
    sent.wait()
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim, ctx.layer = axis, dim, axis.layer
        return _gather_along(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scatter_along(grad, ctx.axis, ctx.dim, ctx.layer, "backward"), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim, ctx.layer = axis, dim, axis.layer
        return _scatter_along(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gather_along(grad, ctx.axis, ctx.dim, ctx.layer, "backward"), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.layer = axis, axis.layer
        x = x.clone(memory_format=torch.contiguous_format)
        _reduce(x, axis).wait()
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        _reduce(grad, ctx.axis, ctx.layer, "backward").wait()
        return grad, None


def _all_to_all(x: Tensor, axis: Axis, *rows_and_where: Any) -> Tensor:
    out, sent = start_all_to_all(x, axis, *rows_and_where)
    sent.wait()
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, send, receive):
        ctx.axis, ctx.send, ctx.receive, ctx.layer = axis, send, receive, axis.layer
        return _all_to_all(x, axis, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        back = _all_to_all(grad, ctx.axis, ctx.receive, ctx.send, ctx.layer, "backward")
        return back, None, None, None
