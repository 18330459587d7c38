"""How a sequence lies while SSD's stages work on it: in chunks, by groups, with its documents.

Between the stages a sequence is M chunks of Q tokens, batch rows one after another, and nothing but
the state scan looks beyond a chunk. The Q x Q tiles are made for a few chunks at a time, so that
they stay in the L2 cache between the half dozen passes over them.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length, M chunks in
all (batch rows x chunks a row), m the chunks of one block. States, decays, dt and every accumulation
are at least fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "Documents",
    "blocks",
    "by_group",
    "by_head",
    "chunked",
    "decay_tile",
    "entering_state",
    "rows",
    "state_by_group",
    "within",
]

TILE_ELEMENTS = 1 << 18
"""Elements of a Q x Q tile set worked on at once: 1 MB in fp32, a common L2 cache of one core."""


class Documents:
    """Which tokens of a chunk belong together; with one document there is nothing to ask."""

    def __init__(self, documents_BL: Tensor | None, Q: int) -> None:
        self.same = self.first = self.last = None
        if documents_BL is None:
            return
        documents = chunked(documents_BL, Q)
        ends = rows(documents[:, -1], documents_BL.shape[0])
        before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1).reshape(-1, 1)
        self.first = documents == before
        """(M, Q): the token continues the document that the chunk before it ended with."""
        self.last = documents == documents[:, -1:]
        """(M, Q): the token belongs to the document that the chunk ends with."""
        self.same = (documents[:, :, None] == documents[:, None, :]).tril_()
        """(M, Q, Q): the column's token is the row's or before it, and of its document."""

    def running_sum(self, steps_MHQ: Tensor) -> Tensor:
        if self.same is None:
            return steps_MHQ.cumsum(-1)
        # A product with zeros and ones, not differences of one running sum: the bits of a document's
        # sums do not depend on the documents before it.
        return steps_MHQ @ self.same.to(steps_MHQ.dtype).transpose(-1, -2)

    def running_sum_backward(self, grad_MHQ: Tensor) -> Tensor:
        if self.same is None:
            return grad_MHQ.flip(-1).cumsum(-1).flip(-1)
        return grad_MHQ @ self.same.to(grad_MHQ.dtype)

    def chunk_decay(self, log_decay_MHQ: Tensor) -> Tensor:
        total = log_decay_MHQ[..., -1]
        if self.first is None:
            return total.clone()
        return total.masked_fill(~self.first[:, -1:], -torch.inf)

    def reach(self, log_decay_MHQ: Tensor, m: slice) -> Tensor:
        """(m, H, Q): the factor of the state entering the chunk at each of its tokens."""
        reach = torch.exp(log_decay_MHQ[m])
        return reach if self.first is None else reach.mul_(self.first[m][:, None])


def chunked(tensor_BLx: Tensor, Q: int) -> Tensor:
    return tensor_BLx.reshape(-1, Q, *tensor_BLx.shape[2:])


def rows(tensor_Mx: Tensor, batch: int) -> Tensor:
    return tensor_Mx.reshape(batch, -1, *tensor_Mx.shape[1:])


def blocks(chunks: int, elements: int) -> Iterator[slice]:
    """Slices over chunks such that `elements` of each together fill the tile budget."""
    step = max(1, TILE_ELEMENTS // elements)
    return (slice(start, min(start + step, chunks)) for start in range(0, chunks, step))


def decay_tile(log_decay_mHQ: Tensor) -> Tensor:
    """exp(s_i - s_j), at most 1: what lies above the diagonal or across documents is masked in CB."""
    return (log_decay_mHQ[..., :, None] - log_decay_mHQ[..., None, :]).clamp_(max=0).exp_()


def within(CB_mGQQ: Tensor, marks: Documents, m: slice) -> Tensor:
    """Zero where the column's token is later than the row's, or of another document."""
    return CB_mGQQ.tril_() if marks.same is None else CB_mGQQ.mul_(marks.same[m][:, None])


def by_group(tensor_mQHP: Tensor, groups: int) -> Tensor:
    """(m, Q, H, P) -> (m, G, Q, R P)."""
    return tensor_mQHP.reshape(*tensor_mQHP.shape[:2], groups, -1).transpose(1, 2)


def by_head(tensor_mQHP: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, Q, H, P) -> (m, H, Q, P), contiguous."""
    return tensor_mQHP.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)


def state_by_group(state_mHPN: Tensor, groups: int) -> Tensor:
    """(m, H, P, N) -> (m, G, R P, N)."""
    return state_mHPN.reshape(state_mHPN.shape[0], groups, -1, state_mHPN.shape[3])


def entering_state(entering_MHPN: Tensor, prefix_MH: Tensor, initial_BHPN: Tensor | None, m: slice) -> Tensor:
    if initial_BHPN is None:
        return entering_MHPN[m]
    chunks_a_row = entering_MHPN.shape[0] // initial_BHPN.shape[0]
    row = torch.arange(m.start, m.stop, device=prefix_MH.device) // chunks_a_row
    return torch.addcmul(entering_MHPN[m], initial_BHPN[row], torch.exp(prefix_MH[m])[..., None, None])
