"""A tensor that travels while others compute, and whose gradient travels back in the same way.

`depart` starts the message and `Travelling.wait` gives what arrived; between them stands the work that
hides it. In the backward the gradient leaves where the forward waited, and is waited for where the
forward left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import Sent, start_all_to_all, start_gather, start_scatter, start_swap
from .mesh import Axis

__all__ = [
    "Arrival",
    "Start",
    "Travelling",
    "all_to_all_later",
    "depart",
    "once",
    "start_all_gather",
    "swap_later",
]

Start = Callable[[Tensor], tuple[Tensor, Sent | None]]
"""Starts a message; returns the buffer that it fills and its handle, None where it is filled already."""


@dataclass
class _Trip:
    out: Start
    back: Start
    sent: Sent | None = None
    arriving: Tensor | None = None
    """The gradient, on its way back."""


class Travelling:
    """A tensor under way; wait for it once."""

    def __init__(self, buffer: Tensor, trip: _Trip) -> None:
        self._buffer, self._trip = buffer, trip

    def wait(self) -> Tensor:
        return _Arrive.apply(self._buffer, self._trip)


def depart(x: Tensor, out: Start, back: Start) -> Travelling:
    """Start a message.

    Args:
        out: takes x.
        back: takes the gradient of what arrived, and brings that of x, in x's shape.
    """
    trip = _Trip(out, back)
    return Travelling(_Depart.apply(x, trip), trip)


def start_all_gather(x: Tensor, axis: Axis) -> Travelling:
    """The ranks' tensors stacked along a new first dim; the gradient is summed and scattered back."""
    layer = axis.layer
    return depart(
        x,
        lambda tensor: start_gather(tensor, axis),
        lambda grad: start_scatter(grad, axis, layer, "backward"),
    )


def swap_later(x: Tensor, axis: Axis, partner: int) -> Travelling:
    """This rank's tensor for that of the rank at `partner`, of the same shape; so does the gradient."""
    layer = axis.layer
    return depart(
        x,
        lambda tensor: start_swap(tensor, axis, partner),
        lambda grad: start_swap(grad, axis, partner, layer, "backward"),
    )


@dataclass
class Arrival:
    """What arrived in the forward, for a layer that is computed again: nothing is sent twice."""

    tensor: Tensor | None = None


def once(start: Start, kept: Arrival) -> Start:
    """Start a message the first time, and give what it brought the second."""

    def out(x: Tensor) -> tuple[Tensor, Sent | None]:
        if kept.tensor is not None:
            return kept.tensor.detach(), None
        buffer, sent = start(x)
        # Autograd ties its graph to what is returned; what is kept must not hold that.
        kept.tensor = buffer.detach()
        return buffer, sent

    return out


def all_to_all_later(
    x: Tensor,
    axis: Axis,
    send: Sequence[int],
    receive: Sequence[int],
    kind: str,
    kept: Arrival | None = None,
) -> Travelling:
    """Rows to each rank and rows from each, in the order of ranks; the gradient goes the way back.

    Args:
        x: (sum of `send`, …).
        kind: for the ledger.
        kept: takes what arrives, and gives it the second time; None sends each time.
    """
    layer = axis.layer

    def out(tensor: Tensor) -> tuple[Tensor, Sent | None]:
        return start_all_to_all(tensor, axis, send, receive, layer, kind=kind)

    def back(grad: Tensor) -> tuple[Tensor, Sent | None]:
        return start_all_to_all(grad, axis, receive, send, layer, "backward", kind)

    return depart(x, out if kept is None else once(out, kept), back)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        buffer, trip.sent = trip.out(x)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        trip = ctx.trip
        if trip.sent is not None:
            trip.sent.wait()
        grad, trip.sent, trip.arriving = trip.arriving, None, None
        return grad, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, ctx.shape = trip, buffer.shape
        if trip.sent is not None:
            trip.sent.wait()
            trip.sent = None
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        trip.arriving, trip.sent = trip.back(grad)
        # Autograd wants a gradient to follow; the one that counts is on its way.
        return grad.new_zeros(()).expand(ctx.shape), None
