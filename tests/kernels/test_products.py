"""Products of bf16 with and without a processor's instructions for it."""

import pytest
import torch
import torch.nn.functional as F

from plait.kernels import products
from plait.kernels.attention import causal_attention
from plait.kernels.cross_entropy import linear_cross_entropy
from plait.kernels.experts import grouped_linear
from plait.kernels.ssd import ssd


def scan(x, weight):
    """A scan whose inputs both come from x."""
    heads = (x @ weight.t()).unflatten(-1, (2, 8))
    y, _ = ssd(
        heads, heads.float().mean(-1), -torch.ones(2), heads[..., :1, :], heads[..., 1:, :], chunk_size=8
    )
    return y


def attention(x, weight):
    heads = (x @ weight.t()).unflatten(-1, (2, 8))
    return causal_attention(heads, heads, heads)


def experts(x, weight):
    return grouped_linear(x.flatten(0, 1), weight.unflatten(0, (2, 8)), torch.tensor([20, 30]))


def loss(x, weight):
    targets = torch.arange(50).remainder(16)
    return linear_cross_entropy(x.flatten(0, 1), weight, targets)[0]


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("operator", [products.linear, scan, attention, experts, loss])
def test_in_bf16_they_are_those_of_fp32_rounded(monkeypatch, operator, has_bf16):
    monkeypatch.setattr(products, "MULTIPLIES_BF16", has_bf16)
    x = torch.randn(2, 25, 16).bfloat16().requires_grad_()
    weight = (torch.randn(16, 16) / 4).bfloat16().requires_grad_()
    out = operator(x, weight)
    wide = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = operator(*wide)
    assert out.dtype == (torch.float32 if operator is loss else torch.bfloat16)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(out, (x, weight), grad.to(out.dtype))
    wanted = torch.autograd.grad(expected, wide, grad)
    assert [one.dtype for one in found] == [torch.bfloat16] * 2
    for one, other in zip((out, *found), (expected, *wanted), strict=True):
        assert (one.float() - other).norm() <= 0.02 * other.norm()


def test_a_gradient_that_nobody_wants_is_not_made(monkeypatch):
    monkeypatch.setattr(products, "MULTIPLIES_BF16", False)
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(products.linear(x, weight).sum(), weight)
    assert torch.equal(grad, x.float().sum(0).expand(5, 4).bfloat16())
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight), rtol=1e-2, atol=1e-2)
