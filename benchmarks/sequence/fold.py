"""Attention over a cut sequence, with and without the fold of queries: bytes, seconds, work.

Shapes: B batch, T tokens of this rank, H query heads, K key heads, d head dim.
"""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from plait.parallel.attention import attend, send_keys
from plait.parallel.ledger import Ledger

from .layer import sequence_mesh
from .volumes import AttentionShape, Sent, attention_sent

__all__ = ["job"]

PLAIN, FOLDED = "plain", "folded"


def job(rank: int, ranks: int, *, shape: dict[str, int], turns: dict[str, int]) -> list[dict[str, Any]]:
    """A record for each length and form: bytes, checked against the closed formulas, and for each turn
    the seconds that passed and those that this rank's processor worked, forward and backward.

    Args:
        turns: length -> how often it is timed.
    """
    sizes, mesh = AttentionShape(**shape), sequence_mesh(rank, ranks)
    meshes = {form: replace(mesh, fold_queries=form == FOLDED) for form in (PLAIN, FOLDED)}
    records = []
    for length, times in ((int(length), times) for length, times in turns.items()):
        torch.manual_seed(rank)
        tokens = (sizes.batch, length // ranks)
        q, grad = (torch.randn(*tokens, sizes.heads, sizes.head_dim) for _ in range(2))
        k, v = (torch.randn(*tokens, sizes.key_heads, sizes.head_dim) for _ in range(2))
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

        def step(form: str, leaves: list[torch.Tensor] = leaves, grad: torch.Tensor = grad) -> None:
            q, k, v = leaves
            out = attend(q, send_keys(k, v, meshes[form]), meshes[form], document_ids_BS=None)
            torch.autograd.grad(out, leaves, grad)

        by_form: dict[str, dict[str, Any]] = {
            form: {"form": form, "length": length, "seconds": [], "worked": []} for form in meshes
        }
        for _ in range(times):
            for form, record in by_form.items():
                dist.barrier()
                start, worked = time.perf_counter(), time.process_time()
                with mesh.record() as ledger:
                    step(form)
                record["worked"].append(time.process_time() - worked)
                record["seconds"].append(time.perf_counter() - start)
                record |= _sent(ledger, attention_sent(sizes, length, ranks, rank), form)
        records += by_form.values()
    return records


def _sent(ledger: Ledger, expected: dict[str, Sent], form: str) -> dict[str, int]:
    for direction, kind in (("forward", "all_gather"), ("backward", "reduce_scatter")):
        gathered = ledger.sent(kind=kind)
        assert gathered == expected["gather"][direction], f"{kind} of {form}: {gathered}"
        swapped = ledger.sent(kind="swap", direction=direction)
        wanted = expected["fold"][direction] if form == FOLDED else 0
        assert swapped == wanted, f"swap of {form}, {direction}: {swapped}, by formula {wanted}"
    swapped = ledger.sent(kind="swap")
    return {"gather": ledger.sent() - swapped, "fold": swapped}
