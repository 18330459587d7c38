"""Bytes that leave a rank for one layer of experts, in closed form.

R ranks of ep, K experts a token, T tokens of a rank, S = T K rows, W the width that experts work in, e bytes
of an activation; E experts, whose numbers of rows are int64.
"""

from dataclasses import dataclass

__all__ = ["NUMBER", "Sent", "even_sent", "layer_sent", "tensor_cut_sent"]

NUMBER = 8
"""Bytes of a number of rows."""


@dataclass(frozen=True)
class Sent:
    """Bytes of each kind and direction."""

    expert_counts: int
    dispatch: int
    """Rows on their way to experts; the gradients of what experts returned go the same way."""
    combine: int
    """What experts returned, on its way back; the gradients of what they got go the same way."""

    def of(self, kind: str, direction: str, *, recomputed: bool) -> int:
        """
        Args:
            recomputed: whether rows travel again where the layer is computed again.
        """
        if kind == "expert_counts":
            return self.expert_counts if direction == "forward" else 0
        if direction == "recompute":
            return getattr(self, kind) if recomputed else 0
        back = {"dispatch": self.combine, "combine": self.dispatch}
        return getattr(self, kind) if direction == "forward" else back[kind]

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.expert_counts + 2 * (self.dispatch + self.combine)


def layer_sent(rows_RR: list[list[int]], place: int, experts: int, row: int) -> Sent:
    """By the rank at a place.

    Args:
        rows_RR: that each rank has for the experts of each.
        row: bytes, W e.
    """
    ranks = len(rows_RR)
    leaving = sum(rows_RR[place]) - rows_RR[place][place]
    guests = sum(rows[place] for rows in rows_RR) - rows_RR[place][place]
    return Sent((ranks - 1) * (experts // ranks) * NUMBER, leaving * row, guests * row)


def even_sent(rows: int, ranks: int, experts: int, row: int) -> Sent:
    """Where every rank's experts get as many of a rank's S rows."""
    leaving = rows * (ranks - 1) // ranks
    return Sent((ranks - 1) * (experts // ranks) * NUMBER, leaving * row, leaving * row)


def tensor_cut_sent(rows: int, ranks: int, tp: int, row: int) -> int:
    """Forward and backward, for even routing, of experts divided over R / tp ranks and each cut over tp.

    So does Megatron-LM's `alltoall` dispatcher, whose expert-tensor-parallel-size is that of the other layers
    unless set (megatron/core/transformer/moe: README.md, token_dispatcher.py): rows go by an all-to-all over
    ep, are gathered over tp, and come back by a reduce-scatter over tp and an all-to-all; the backward is
    that in reverse. Numbers of rows and the router's weights, which it sends too, are left out. The sum is
    tp times what all ranks on ep send.
    """
    ep = ranks // tp
    one_way = rows * (ep - 1) // ep + rows * (tp - 1)
    return 4 * one_way * row
