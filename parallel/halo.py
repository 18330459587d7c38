"""The last tokens of the shard before this one, for a convolution that looks back across the cut.

In the backward the halo's gradient goes to the rank it came from, and is added at its last tokens.

Shapes: B batch, L tokens of this shard, K tokens of the halo, D width.
"""

import torch
from torch import Tensor

from .collectives import Sent, exchange_neighbours
from .mesh import Axis
from .travel import Arrival, Travelling, depart, once

__all__ = ["send_halo"]


def send_halo(
    x_BLD: Tensor, halo: int, document_ids_BL: Tensor | None, axis: Axis, kept: Arrival
) -> Travelling:
    """Send this shard's last `halo` tokens to the next and expect those of the one before.

    Tokens of another document than the shard's last are sent as zeros: the receiver counts the whole
    halo to the document that it continues.

    Args:
        document_ids_BL: non-decreasing; None is one document.
        axis: of at least two ranks, each with at least `halo` tokens.

    Returns:
        What will be (B, K, D), zero on the sequence's first shard.
    """
    tail = x_BLD[:, -halo:]
    if document_ids_BL is not None:
        own = document_ids_BL[:, -halo:] == document_ids_BL[:, -1:]
        tail = tail.masked_fill(~own[..., None], 0)
    layer = axis.layer

    def onwards(tail_BKD: Tensor) -> tuple[Tensor, Sent | None]:
        return _send(tail_BKD, axis, 1, layer)

    def back(grad_BKD: Tensor) -> tuple[Tensor, Sent | None]:
        return _send(grad_BKD, axis, -1, layer)

    return depart(tail, once(onwards, kept), back)


def _send(tensor: Tensor, axis: Axis, step: int, layer: int | None) -> tuple[Tensor, Sent]:
    """Along the axis, or back along it; the ends of the line send or receive nothing."""
    into = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    to, source = axis.place + step, axis.place - step
    sent = exchange_neighbours(
        tensor.contiguous() if 0 <= to < axis.size else None,
        to,
        into if 0 <= source < axis.size else None,
        source,
        axis,
        "halo",
        layer,
        "forward" if step == 1 else "backward",
    )
    return into, sent
