"""What a layer's ranks send each other, by the mesh's ledger, held against the closed formulas.

Shapes: T tokens of a rank, K experts a token, R ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.parallel.ledger import Ledger
from plait.parallel.mesh import Mesh
from plait.pretrain.model import Packing
from plait.pretrain.model.layers import Kept
from plait.pretrain.model.moe import MoE

from .imbalance import choices, expert_mesh
from .shapes import Shape
from .volumes import layer_sent

__all__ = ["KINDS", "WAYS", "job"]

KINDS = ("expert_counts", "dispatch", "combine")
DIRECTIONS = ("forward", "recompute", "backward")
CHOICES = ("the router's", "one hot expert")
WAYS = {"once": (False, False), "computed again": (True, False), "kept": (True, True)}
"""Whether the backward computes the layer again, and whether it keeps the rows that came."""


def job(
    rank: int, ranks: int, *, shapes: Sequence[dict[str, Any]], tokens: int, dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    """A record for each dtype, shape, choice and way to compute it: bytes of each kind, by direction."""
    connected, records = expert_mesh(rank, ranks), []
    for way, (again, keep) in WAYS.items():
        mesh = replace(connected, keep_dispatched=keep)
        for dtype, sizes, choice in itertools.product(dtypes, shapes, CHOICES):
            shape = Shape(**sizes)
            layer, kept = shape.layer(mesh), Kept(mesh)
            torch.manual_seed(rank)
            x, grad = (torch.randn(1, tokens, shape.d_model).to(getattr(torch, dtype)) for _ in range(2))
            if choice == "one hot expert":
                kept.choice_BLK = choices(tokens, shape, 1.0)[None]
            with mesh.record() as ledger:
                _step(layer, mesh, kept, x, grad, again=again)
            assert kept.choice_BLK is not None
            rows_RR = _rows(kept.choice_BLK, shape.num_experts // ranks, ranks)
            sent = _checked(ledger, rows_RR, rank, shape, x.itemsize, recomputed=again and not keep)
            records.append({"dtype": dtype, "shape": sizes, "choice": choice, "way": way, "sent": sent})
    return records


def _step(layer: MoE, mesh: Mesh, kept: Kept, x: Tensor, grad: Tensor, *, again: bool) -> None:
    packing = Packing(torch.arange(x.shape[1])[None], None)

    def run(x: Tensor) -> Tensor:
        with mesh.layer(0):
            return layer(x, packing, kept)[0]

    x = x.detach().requires_grad_()
    (checkpoint(run, x, use_reentrant=False) if again else run(x)).backward(grad)


def _rows(choice_BLK: Tensor, experts: int, ranks: int) -> list[list[int]]:
    """That each rank has for the experts of each, from what all chose."""
    mine_R = torch.bincount(choice_BLK.flatten() // experts, minlength=ranks)
    rows_RR = mine_R.new_empty(ranks, ranks)
    dist.all_gather(list(rows_RR), mine_R)
    return rows_RR.tolist()


def _checked(
    ledger: Ledger, rows_RR: list[list[int]], rank: int, shape: Shape, element: int, *, recomputed: bool
) -> dict[str, list[int]]:
    formula = layer_sent(rows_RR, rank, shape.num_experts, shape.width * element)
    sent = {
        kind: [ledger.sent(axis="ep", kind=kind, layer=0, direction=d) for d in DIRECTIONS] for kind in KINDS
    }
    expected = {kind: [formula.of(kind, d, recomputed=recomputed) for d in DIRECTIONS] for kind in KINDS}
    assert sent == expected, f"{shape}, rank {rank}: {sent}, by formula {expected}"
    assert ledger.sent() == sum(map(sum, sent.values())), "the ledger holds more than the layer's bytes"
    return sent
