"""The paper's minimal form of the scan, the rival that anybody can write (and compile)."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["minimal"]


def minimal(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, Q: int) -> Tensor:
    """Section 6 of arXiv 2405.21060 as four einsums, decays from masked segment sums, in x's dtype."""
    batch, length, heads, head_dim = x.shape
    repeat = heads // B.shape[2]
    chunks = length // Q
    step = F.softplus(dt)
    X = (x * step[..., None]).to(x.dtype).view(batch, chunks, Q, heads, head_dim)
    Bc, Cc = (t.repeat_interleave(repeat, 2).view(batch, chunks, Q, heads, -1) for t in (B, C))
    a = (step * A).view(batch, chunks, Q, heads).permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    L = torch.exp(_segment_sums(a)).to(x.dtype)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", Cc, Bc, L, X)
    to_end = torch.exp(total[..., -1:] - total).to(x.dtype)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", Bc, to_end, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = torch.exp(_segment_sums(F.pad(total[..., -1], (1, 0)))).to(x.dtype)
    entering = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    from_start = torch.exp(total).to(x.dtype)
    through = torch.einsum("bclhn,bchpn,bhcl->bclhp", Cc, entering, from_start)
    return (inside + through).reshape(x.shape)


def _segment_sums(a: Tensor) -> Tensor:
    Q = a.shape[-1]
    spread = a[..., None].expand(*a.shape, Q)
    below = torch.ones(Q, Q, dtype=torch.bool, device=a.device).tril(-1)
    sums = spread.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones_like(below).tril(), -torch.inf)
