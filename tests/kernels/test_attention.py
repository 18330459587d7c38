"""Causal attention against its formula, with grouped queries and packed documents."""

import pytest
import torch

from plait.kernels.attention import causal_attention, causal_attention_naive, eager

BATCH, DIM = 2, 8


def inputs(length, heads, key_heads, dtype=torch.float64):
    def normal(h):
        return torch.randn(BATCH, length, h, DIM, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(heads), normal(key_heads), normal(key_heads)


def documents(length):
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, cuts in enumerate(((1, 40, 64, 200), (8, 48))):
        for cut in cuts:
            ids[row, cut:] += 1
    return ids


@pytest.mark.parametrize("length", [1, 63, 250])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_agrees_with_the_formula(length, heads, key_heads, packed, monkeypatch):
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 2048)
    qkv = inputs(length, heads, key_heads)
    ids = documents(length) if packed else None
    expected = causal_attention_naive(*qkv, document_ids_BL=ids)
    actual = causal_attention(*qkv, document_ids_BL=ids)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_bf16_accumulates_in_fp32():
    qkv = inputs(250, 4, 2, torch.bfloat16)
    exact = [t.detach().double() for t in qkv]
    actual = causal_attention(*qkv, document_ids_BL=documents(250))
    expected = causal_attention_naive(*exact, document_ids_BL=documents(250))
    assert actual.dtype == torch.bfloat16
    # One rounding of the output to 8 bits.
    assert (actual.double() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_a_document_does_not_change_a_bit_of_another():
    q, k, v = (t.detach() for t in inputs(250, 4, 2, torch.float32))
    ids = documents(250)
    hit = ids == 2
    out = causal_attention(q, k, v, document_ids_BL=ids)
    k2, v2 = k.clone(), v.clone()
    k2[hit] += 3
    v2[hit] *= -2
    other = causal_attention(q, k2, v2, document_ids_BL=ids)
    assert torch.equal(other[~hit], out[~hit])
    assert not torch.equal(other[hit], out[hit])


def test_operators_are_registered_well():
    q, k, v = inputs(20, 4, 2, torch.float32)
    torch.library.opcheck(torch.ops.plait.attention, (q, k, v, documents(20)))
