"""The way to torch's flash attention, whose kernel needs a GPU: here a loop over its sequences stands in.

The stand-in takes what the kernel takes, queries aligned to the end of their sequence's keys, so that where
sequences begin, what is told of them and the layouts of all results are what is tested.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.attention import causal_attention, causal_attention_naive, flash

B, H, K, DIM = 3, 4, 2, 8


def forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, ...]:
    out, lse = torch.full_like(q, torch.nan), q.new_full((H, len(q)), torch.nan)
    for queries, keys, weights, total in _sequences(q, k, *given):
        out[queries] = torch.einsum("hqs,shd->qhd", weights, _shared(v[keys]))
        lse[:, queries] = total
    return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    dq, dk, dv = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    *bounds, dropout, causal, _, _ = given
    for queries, keys, weights, total in _sequences(q, k, *bounds, dropout, causal, False):
        torch.testing.assert_close(lse[:, queries], total)
        flow = torch.einsum("qhd,shd->hqs", grad[queries], _shared(v[keys]))
        delta = (grad[queries] * out[queries]).sum(-1).t()[..., None]
        slope = weights * (flow - delta) / DIM**0.5
        dq[queries] = torch.einsum("hqs,shd->qhd", slope, _shared(k[keys]))
        dk[keys] = torch.einsum("hqs,qhd->shd", slope, q[queries]).unflatten(1, (K, -1)).sum(2)
        dv[keys] = torch.einsum("hqs,qhd->shd", weights, grad[queries]).unflatten(1, (K, -1)).sum(2)
    return dq, dk, dv


def _sequences(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *constants: object
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Each sequence's queries, keys, weights and log-sum-exp."""
    assert constants == (0.0, True, False)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[0] == cu_k[0] == 0
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        queries, keys = q1 - q0, k1 - k0
        if queries == 0:
            continue
        assert queries <= min(keys, max_q)
        assert keys <= max_k
        scores = torch.einsum("qhd,shd->hqs", q[q0:q1], _shared(k[k0:k1])) / DIM**0.5
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~seen, -torch.inf)
        yield slice(q0, q1), slice(k0, k1), scores.softmax(-1), scores.logsumexp(-1)


def _shared(k: Tensor) -> Tensor:
    return k.repeat_interleave(H // K, dim=1)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 50), (0, 21), (13, 20), (49, 1), (20, 30)])
def test_agrees_with_the_formula(
    offset: int, length: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "fits", lambda q: True)
    monkeypatch.setattr(flash, "FORWARD", forward)
    monkeypatch.setattr(flash, "BACKWARD", backward)
    S = 50
    ids = torch.zeros(B, S, dtype=torch.int64)
    for row, starts in enumerate(((1, 2, 20, 33, 45), (), (20, 49))):
        for start in starts:
            ids[row, start:] += 1
    q = torch.randn(B, length, H, DIM, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, S, K, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for documents in (ids, ids + 4, torch.arange(S).expand(B, S)):
        most = (int(documents.max() - documents.min()) + 1, 50) if told else (0, 0)
        wanted = causal_attention_naive(q, k, v, document_ids_BS=documents, offset=offset)
        got = causal_attention(q, k, v, document_ids_BS=documents, offset=offset, most=most)
        torch.testing.assert_close(got, wanted)
        flow = torch.randn_like(wanted)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), flow),
            torch.autograd.grad(wanted, (q, k, v), flow),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_one_document_whose_queries_start_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "fits", lambda q: True)
    monkeypatch.setattr(flash, "FORWARD", forward)
    q, k = torch.randn(B, 3, H, DIM, dtype=torch.float64), torch.randn(B, 20, K, DIM, dtype=torch.float64)
    for offset in (5, 17):
        got = causal_attention(q, k, k, offset=offset)
        torch.testing.assert_close(got, causal_attention_naive(q, k, k, offset=offset))


def test_only_half_precision_on_a_gpu_fits() -> None:
    assert not flash.fits(torch.empty(1, 2, 2, 8, dtype=torch.bfloat16))
