"""Causal attention against its formula: grouped queries, packed documents, queries that start late."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.kernels.attention import causal_attention, causal_attention_naive, eager

BATCH, DIM = 2, 8


def inputs(length, heads, key_heads, dtype=torch.float64, queries=None):
    def normal(tokens, h):
        return torch.randn(BATCH, tokens, h, DIM, dtype=torch.float64).to(dtype).requires_grad_()

    return (
        normal(length if queries is None else queries, heads),
        normal(length, key_heads),
        normal(length, key_heads),
    )


def documents(length):
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, cuts in enumerate(((1, 40, 64, 200), (8, 48))):
        for cut in cuts:
            ids[row, cut:] += 1
    return ids


def assert_agrees(qkv, **options):
    expected = causal_attention_naive(*qkv, **options)
    actual = causal_attention(*qkv, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 63, 250])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_agrees_with_the_formula(length, heads, key_heads, packed, monkeypatch):
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 2048)
    assert_agrees(inputs(length, heads, key_heads), document_ids_BS=documents(length) if packed else None)


# Queries at the start, in the middle and at the end of the keys; one alone; across documents and inside one.
@pytest.mark.parametrize(("offset", "queries"), [(0, 63), (1, 1), (37, 65), (187, 63), (249, 1), (70, 101)])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_queries_that_start_late_agree_with_the_formula(
    offset, queries, heads, key_heads, packed, monkeypatch
):
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 2048)
    qkv = inputs(250, heads, key_heads, queries=queries)
    assert_agrees(qkv, document_ids_BS=documents(250) if packed else None, offset=offset)


@pytest.mark.parametrize("cuts", [(0, 125, 250), (0, 63, 64, 250)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_parts_make_the_whole(cuts, packed, monkeypatch):
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 2048)
    q, k, v = inputs(250, 4, 2)
    ids = documents(250) if packed else None
    whole = causal_attention(q, k, v, document_ids_BS=ids)
    parts = [
        causal_attention(q[:, start:end], k, v, document_ids_BS=ids, offset=start)
        for start, end in pairwise(cuts)
    ]
    joined = torch.cat(parts, 1)
    torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(whole)
    for a, e in zip(
        torch.autograd.grad(joined, (q, k, v), grad), torch.autograd.grad(whole, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("offset", [0, 50])
def test_keys_after_the_last_query_are_seen_by_none(offset, packed):
    q, k, v = inputs(250, 4, 2, torch.float32, queries=61)
    end = offset + 61
    ids = documents(250)
    out = causal_attention(q, k, v, document_ids_BS=ids if packed else None, offset=offset)
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dk[:, end:].any()
    assert not dv[:, end:].any()
    assert dv[:, :end].any()
    short = causal_attention(
        q, k[:, :end], v[:, :end], document_ids_BS=ids[:, :end] if packed else None, offset=offset
    )
    assert torch.equal(out, short)


@pytest.mark.parametrize("offset", [0, 100])
def test_bf16_accumulates_in_fp32(offset):
    qkv = inputs(250, 4, 2, torch.bfloat16, queries=250 - offset)
    exact = [t.detach().double() for t in qkv]
    actual = causal_attention(*qkv, document_ids_BS=documents(250), offset=offset)
    expected = causal_attention_naive(*exact, document_ids_BS=documents(250), offset=offset)
    assert actual.dtype == torch.bfloat16
    # One rounding of the output to 8 bits.
    assert (actual.double() - expected).abs().max() <= expected.abs().max() * 2**-8


@pytest.mark.parametrize("offset", [0, 41, 90])
def test_a_document_does_not_change_a_bit_of_another(offset):
    q, k, v = (t.detach() for t in inputs(250, 4, 2, torch.float32))
    q = q[:, offset:].contiguous()
    ids = documents(250)
    hit = ids == 2

    def run(k, v):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = causal_attention(*leaves, document_ids_BS=ids, offset=offset)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    k2, v2 = k.clone(), v.clone()
    k2[hit] += 3
    v2[hit] *= -2
    own = hit[:, offset:]
    for before, after, changed in zip(run(k, v), run(k2, v2), (own, own, hit, hit), strict=True):
        assert torch.equal(after[~changed], before[~changed])
        assert not torch.equal(after[changed], before[changed])


def test_operators_are_registered_well():
    q, k, v = inputs(20, 4, 2, torch.float32)
    torch.library.opcheck(torch.ops.plait.attention, (q, k, v, documents(20), 0))
    late = q[:, 9:15].detach().requires_grad_()
    torch.library.opcheck(torch.ops.plait.attention, (late, k, v, documents(20), 9))
    torch.library.opcheck(torch.ops.plait.attention, (late, k, v, None, 9))
    plain = [t.detach() for t in (late, k, v)]
    saved = torch.ops.plait.attention(*plain, documents(20), 9)
    dout = torch.randn_like(saved[0])
    torch.library.opcheck(torch.ops.plait.attention_backward, (dout, *plain, *saved, documents(20), 9))


@pytest.mark.parametrize(("offset", "queries"), [(0, 20), (9, 6), (14, 1)])
def test_operations_are_counted(offset, queries):
    qkv = inputs(20, 4, 2, torch.float32, queries=queries)
    pairs = sum(offset + i + 1 for i in range(queries))
    with FlopCounterMode(display=False) as counter:
        causal_attention(*qkv, document_ids_BS=documents(20), offset=offset).sum().backward()
    # Two products forward and five backward, of a multiplication and an addition each.
    assert counter.get_total_flops() == 7 * 2 * BATCH * 4 * DIM * pairs


def test_wrong_inputs_are_named():
    q, k, v = inputs(20, 4, 2, queries=6)
    with pytest.raises(ValueError, match=r"queries \[15, 21\) of 20 keys"):
        causal_attention(q, k, v, offset=15)
    with pytest.raises(ValueError, match=r"queries \[-1, 5\) of 20 keys"):
        causal_attention(q, k, v, offset=-1)
    with pytest.raises(ValueError, match=r"document ids \(2, 6\), keys \(2, 20, 2, 8\)"):
        causal_attention(q, k, v, document_ids_BS=documents(6))
