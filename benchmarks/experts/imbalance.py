"""Time of the layer as one expert gets hotter, on one rank or with experts over several.

Shapes: T tokens of a rank, K experts a token, E experts, D model width.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plait.parallel.mesh import Mesh
from plait.pretrain.model import Packing
from plait.pretrain.model.layers import Kept

from .shapes import Shape

__all__ = ["choices", "expert_mesh", "job"]


def expert_mesh(rank: int, ranks: int, **options: Any) -> Mesh:
    """All ranks on ep; each has tokens of its own."""
    sizes = {"dp_shard": ranks, "ep": ranks}
    return Mesh.create(sizes, rank=rank, world_size=ranks, **options).connect(torch.device("cpu"))


def choices(tokens: int, shape: Shape, share: float) -> Tensor:
    """Each token's experts (T, K), of which that many tokens have expert 0 and all others are even.

    Args:
        share: of the tokens; K / E is even.
    """
    cool, hot = shape.num_experts - 1, round(share * tokens)
    chosen_TK = torch.empty(tokens, shape.top_k, dtype=torch.long)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    turn = 0
    for place, token in enumerate(order.tolist()):
        first = 0 if place >= hot else 1
        chosen_TK[token, :first] = 0
        # Neighbours, in turn: as often each, and never twice for one token.
        others = shape.top_k - first
        chosen_TK[token, first:] = 1 + torch.arange(turn, turn + others) % cool
        turn += others
    return chosen_TK


def job(
    rank: int,
    ranks: int,
    *,
    shapes: Sequence[dict[str, Any]],
    tokens: int,
    dtypes: Sequence[str],
    hot: Sequence[float],
    turns: int,
) -> list[dict[str, Any]]:
    """A record for each dtype, shape and share, even first: the rows of this rank's experts, and for each
    turn the seconds that passed and those that this rank's processor worked, forward and backward."""
    mesh, records = expert_mesh(rank, ranks), []
    for dtype in dtypes:
        for sizes in shapes:
            shape = Shape(**sizes)
            shares = [shape.top_k / shape.num_experts, *hot]
            for record in _timed(mesh, shape, tokens, getattr(torch, dtype), shares, turns):
                records.append({"dtype": dtype, "shape": sizes, **record})
    return records


def _timed(
    mesh: Mesh, shape: Shape, tokens: int, dtype: torch.dtype, shares: Sequence[float], turns: int
) -> list[dict[str, Any]]:
    layer, ep = shape.layer(mesh), mesh.ep
    torch.manual_seed(mesh.rank)
    x, grad = (torch.randn(1, tokens, shape.d_model).to(dtype) for _ in range(2))
    packing = Packing(torch.arange(tokens)[None], None)
    chosen = {share: choices(tokens, shape, share)[None] for share in shares}

    def step(share: float) -> None:
        layer.zero_grad()
        kept = Kept(mesh)
        kept.choice_BLK = chosen[share]
        layer(x.detach().requires_grad_(), packing, kept)[0].backward(grad)

    mine = shape.num_experts // ep.size
    records: dict[float, dict[str, Any]] = {}
    for share in shares:
        # All ranks choose alike.
        rows = ep.size * int((chosen[share] // mine == ep.place).sum())
        records[share] = {"share": share, "rows": rows, "seconds": [], "worked": []}
    for turn in range(1 + turns):
        # What came just before leaves its mark; so nobody always follows the same one's.
        first = turn % len(shares)
        for share in [*shares[first:], *shares[:first]]:
            if ep.size > 1:
                dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            step(share)
            worked, seconds = time.process_time() - worked, time.perf_counter() - start
            if turn > 0:
                record = records[share]
                record["worked"].append(worked)
                record["seconds"].append(seconds)
    return list(records.values())
