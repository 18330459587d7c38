"""Sorted experts against one expert after another."""

import pytest
import torch

from plait.kernels.experts import (
    choose_experts,
    choose_experts_naive,
    combine,
    dispatch,
    experts_naive,
    grouped_linear,
    sort_by_expert,
)

TOKENS, CHOICES, EXPERTS, WIDTH, HIDDEN = 37, 2, 5, 6, 7


def inputs(dtype=torch.float64):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    weight = torch.rand(TOKENS, CHOICES, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return (
        normal(TOKENS, WIDTH),
        weight.requires_grad_(),
        normal(EXPERTS, HIDDEN, WIDTH),
        normal(EXPERTS, WIDTH, HIDDEN),
    )


def choices(kind):
    if kind == "one hot expert":
        return torch.tensor([3, 1]).expand(TOKENS, CHOICES).contiguous()
    return torch.rand(TOKENS, EXPERTS).topk(CHOICES).indices


def sorted_experts(x, expert, weight, up, down):
    routing = sort_by_expert(expert, EXPERTS)
    hidden = torch.tanh(grouped_linear(dispatch(x, routing), up, routing.counts_E))
    return combine(grouped_linear(hidden, down, routing.counts_E), weight, routing)


@pytest.mark.parametrize("kind", ["spread", "one hot expert"])
def test_agrees_with_one_expert_after_another(kind):
    x, weight, up, down = inputs()
    expert = choices(kind)
    expected = experts_naive(x, expert, weight, up, down, torch.tanh)
    actual = sorted_experts(x, expert, weight, up, down)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    leaves = (x, weight, up, down)
    for a, e in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spread", "one hot expert", "none"])
def test_one_product_for_all_experts_agrees_with_a_product_each(dtype, kind, monkeypatch):
    """torch's grouped product, where the widths allow it; experts without rows have gradients of zero."""
    counts = {"spread": [3, 0, 9, 1, 24], "one hot expert": [0, 0, 37, 0, 0], "none": [0] * 5}[kind]
    products, grouped_mm = [], torch.nn.functional.grouped_mm

    def counted(*arguments, **options):
        products.append(arguments)
        return grouped_mm(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    x = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 24, 16, dtype=dtype, requires_grad=True)
    actual = grouped_linear(x, weight, torch.tensor(counts))
    grad = torch.randn_like(actual)
    grads = torch.autograd.grad(actual, (x, weight), grad)
    assert len(products) == (0 if kind == "none" else 3)
    expected = torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)])
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, e in zip((actual, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_odd_widths_and_float64_go_without_it(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    monkeypatch.setattr("plait.kernels.products.MULTIPLIES_BF16", True)
    counts = torch.tensor([2, 3])
    for dtype, width in ((torch.float64, 16), (torch.float32, 6), (torch.bfloat16, 12)):
        weight = torch.randn(2, width, width, dtype=dtype)
        assert grouped_linear(torch.randn(5, width, dtype=dtype), weight, counts).shape == (5, width)


def test_counts_and_order_are_those_of_a_stable_sort():
    expert = choices("spread")
    routing = sort_by_expert(expert, EXPERTS)
    assert routing.counts_E.tolist() == [(expert == e).sum().item() for e in range(EXPERTS)]
    flat = expert.flatten()[routing.order_S]
    assert torch.equal(flat, flat.sort().values)
    for e in range(EXPERTS):
        rows = routing.order_S[flat == e]
        assert torch.equal(rows, rows.sort().values)


def test_operators_are_registered_well():
    x, weight, up, _ = inputs(torch.float32)
    routing = sort_by_expert(choices("spread"), EXPERTS)
    rows = dispatch(x, routing).detach().requires_grad_()
    torch.library.opcheck(torch.ops.plait.experts_dispatch, (x, routing.order_S, routing.inverse_TK))
    torch.library.opcheck(torch.ops.plait.grouped_linear, (rows, up, routing.counts_E))
    torch.library.opcheck(torch.ops.plait.experts_combine, (rows, weight, routing.inverse_TK))


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (6, 2), (18, 7), (3, 3)])
def test_the_best_experts_are_chosen(groups, top_groups):
    scores, bias = torch.rand(9, 18, dtype=torch.float64), torch.randn(18)
    options = {"top_k": 5, "num_groups": groups, "top_k_groups": top_groups}
    chosen = choose_experts(scores, bias, **options)
    assert torch.equal(chosen, choose_experts_naive(scores, bias, **options))
    torch.library.opcheck(torch.ops.plait.choose_experts, (scores, bias, *options.values()))
