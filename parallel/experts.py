"""Tokens on their way to experts that live on other ranks, and back: dropless, in an order that is fixed.

Experts are divided over `ep` in blocks of neighbours. A rank's tokens, sorted by expert, are sorted by
rank too: each expert's rank gets its rows in one all-to-all, sorts what came from all ranks by expert,
and sends the outputs back the same way. How many rows come is known only when they are chosen, so the
numbers travel first, and the host waits for them; nothing is padded to a capacity and nothing dropped.

Shapes: T tokens of this rank, K experts a token, S = T K rows, W their width, E experts over all ranks,
R ranks of `ep`, e = E / R experts of this rank, M rows that its experts got.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.experts import Routing, dispatch, sort_by_expert
from .collectives import start_all_to_all
from .mesh import Mesh
from .travel import Arrival, all_to_all_later

__all__ = ["Dispatch"]


class Dispatch:
    """The way of a micro-batch's tokens in one layer.

    A layer that is computed again for its backward takes its forward's: the numbers are not sent again,
    nor, where the mesh says that they are kept, the rows.

    Attributes:
        routing: this rank's rows, sorted over the experts of all ranks.
    """

    def __init__(self, expert_TK: Tensor, num_experts: int, mesh: Mesh) -> None:
        """Sort the tokens and send the numbers of rows ahead; what comes before `to_experts` hides them."""
        self.routing = sort_by_expert(expert_TK, num_experts)
        self._axis, self._keep = mesh.ep, mesh.keep_dispatched
        self._kept_here, self._kept_back = Arrival(), Arrival()
        self._counts_e, self._arrival = self.routing.counts_E, None
        self._send: list[int] | None = None
        if self._axis.size > 1:
            even = [num_experts // self._axis.size] * self._axis.size
            self._counts_Re, self._counts_sent = start_all_to_all(
                self.routing.counts_E, self._axis, even, even, kind="expert_counts"
            )

    def to_experts(self, x_TW: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start sending each token to its experts.

        Returns:
            What waits for the rows of this rank's experts, sorted by expert (M, W), and their numbers (e,).
        """
        rows_SW = dispatch(x_TW, self.routing)
        if self._axis.size == 1:
            return lambda: (rows_SW, self._counts_e)
        if self._send is None:
            self._learn_counts()
        assert self._send is not None
        kept = self._kept_here if self._keep else None
        travelling = all_to_all_later(rows_SW, self._axis, self._send, self._receive, "dispatch", kept)

        def wait() -> tuple[Tensor, Tensor]:
            rows_MW = travelling.wait()
            # From one rank after another; an expert wants its own together.
            if self._arrival is not None:
                rows_MW = dispatch(rows_MW, self._arrival)
            return rows_MW, self._counts_e

        return wait

    def to_tokens(self, y_MW: Tensor) -> Callable[[], Tensor]:
        """Start sending outputs back to where their tokens came from; returns what waits for (S, W)."""
        if self._axis.size == 1:
            return lambda: y_MW
        assert self._send is not None
        if self._arrival is not None:
            y_MW = dispatch(y_MW, _reversed(self._arrival))
        kept = self._kept_back if self._keep else None
        return all_to_all_later(y_MW, self._axis, self._receive, self._send, "combine", kept).wait

    def _learn_counts(self) -> None:
        self._counts_sent.wait()
        ranks = self._axis.size
        here_Re = self._counts_Re.view(ranks, -1)
        there_Re = self.routing.counts_E.view(ranks, -1)
        self._receive, self._send = torch.stack([here_Re.sum(1), there_Re.sum(1)]).tolist()
        self._counts_e = here_Re.sum(0)
        experts = here_Re.shape[1]
        if experts > 1:
            expert_Re = torch.arange(experts, device=here_Re.device).repeat(ranks)
            expert_M = expert_Re.repeat_interleave(here_Re.flatten(), output_size=sum(self._receive))
            self._arrival = sort_by_expert(expert_M[:, None], experts)


def _reversed(routing: Routing) -> Routing:
    """Where one goes there, one comes from here; of a routing of one expert a row."""
    return Routing(routing.inverse_TK.flatten(), routing.order_S[:, None], routing.counts_E)
