"""The fused loss against its specification: values, gradients, masked tokens, memory, operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from plait.kernels import products
from plait.kernels.cross_entropy import eager, linear_cross_entropy, naive

D, V = 12, 37


def make_inputs(
    T: int, dtype: torch.dtype = torch.float64, masked: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < masked, -100)
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("T", [1, 2, 3, 63, 65, 250])
def test_matches_the_specification(
    T: int, z_loss: float, chunk_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of three tokens inside a chunk, so that both divisions leave a remainder.
    monkeypatch.setattr("plait.kernels.cross_entropy.eager.block_rows", lambda n, elements, device: 3)
    hidden, weight, targets = make_inputs(T)
    targets[-1] = 5
    total, cross_entropy = linear_cross_entropy(
        hidden, weight, targets, z_loss=z_loss, chunk_tokens=chunk_tokens
    )
    wanted, wanted_cross_entropy = naive.linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cross_entropy, wanted_cross_entropy, rtol=1e-10, atol=1e-10)
    assert not cross_entropy.requires_grad
    # The caller divides by the number of targets, so the incoming gradient is not one.
    got = torch.autograd.grad(total / 7, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(wanted / 7, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_matches_torch() -> None:
    hidden, weight, targets = make_inputs(65)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets = make_inputs(4, masked=0.0)
    targets[1] = -100
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, z_loss=0.1, chunk_tokens=2)[0], (hidden, weight)
    )


def test_fp32() -> None:
    hidden, weight, targets = make_inputs(250, torch.float32)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total, _ = linear_cross_entropy(hidden, weight, targets, z_loss=0.01)
    wanted, _ = naive.linear_cross_entropy(*exact, targets, z_loss=0.01)
    assert total.dtype == torch.float32
    # Sums of 12 products, 37 exponentials and 250 tokens: some tens of 2^-24 of the largest element.
    torch.testing.assert_close(total.double(), wanted, rtol=5e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(wanted, exact), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6 * b.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16(weight_dtype: torch.dtype) -> None:
    hidden, weight, targets = make_inputs(250, torch.bfloat16)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total, cross_entropy = linear_cross_entropy(hidden, weight, targets, chunk_tokens=64)
    wanted, _ = naive.linear_cross_entropy(*exact, targets)
    assert total.dtype == cross_entropy.dtype == torch.float32
    # Logits are rounded to bf16, 2^-8 of values up to about 12; over the tokens the errors average out.
    torch.testing.assert_close(total.double(), wanted, rtol=2e-3, atol=0)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, weight_dtype]
    for a, b in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        # A logit's error of up to 12 · 2^-8 moves its probability by 4.7 %, the gradient's sums by less.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


def test_weight_gradient_is_added_up_in_fp32() -> None:
    """Hundreds of small chunks: added up in bf16, the weight's gradient would stop growing at 256 steps."""
    T = 1024
    hidden = torch.ones(T, 8, dtype=torch.bfloat16)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, torch.zeros(T, dtype=torch.int64), chunk_tokens=1)
    total.backward()
    assert weight.grad is not None
    wanted = torch.full((4, 8), T / 4, dtype=torch.bfloat16)
    wanted[0] = -T * 3 / 4
    assert torch.equal(weight.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_tokens_count_nowhere(dtype: torch.dtype) -> None:
    hidden, weight, targets = make_inputs(65, dtype)
    masked = targets == -100
    disturbed = hidden.detach().clone()
    disturbed[masked] = torch.nan
    disturbed.requires_grad_()
    results = []
    for tensor in (hidden, disturbed):
        total, cross_entropy = linear_cross_entropy(tensor, weight, targets, z_loss=0.1, chunk_tokens=16)
        results.append((total, cross_entropy, *torch.autograd.grad(total, (tensor, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[0][2][masked].any()


@pytest.mark.parametrize("T", [0, 5])
def test_no_target_at_all(T: int) -> None:
    hidden, weight, _ = make_inputs(T, torch.bfloat16)
    targets = torch.full((T,), -100)
    total, cross_entropy = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    assert total.item() == cross_entropy.item() == 0.0
    total.backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_confident_and_hopeless_predictions() -> None:
    """A target whose probability underflows has an exact loss, one that is certain has none."""
    hidden = torch.tensor([[300.0], [300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, torch.tensor([2, 0]))
    assert total.item() == 600.0
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(dhidden, torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(dweight, torch.tensor([[300.0], [0.0], [-300.0]]))


def test_gradients_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *inputs: asked.append(inputs[-2:]) or forward(*inputs))
    hidden, weight, targets = make_inputs(9)
    with torch.no_grad():
        evaluated, _ = linear_cross_entropy(hidden, weight, targets)
    frozen_weight, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    frozen_hidden, _ = linear_cross_entropy(hidden.detach(), weight, targets)
    both, _ = linear_cross_entropy(hidden, weight, targets)
    assert asked == [(False, False), (True, False), (False, True), (True, True)]
    assert not evaluated.requires_grad
    assert evaluated == frozen_weight == frozen_hidden == both
    dhidden, dweight = torch.autograd.grad(both, (hidden, weight))
    assert torch.equal(torch.autograd.grad(frozen_weight, hidden)[0], dhidden)
    assert torch.equal(torch.autograd.grad(frozen_hidden, weight)[0], dweight)


def test_backward_twice_and_any_strides() -> None:
    hidden, weight, targets = make_inputs(9)
    turned = hidden.detach().t().contiguous().t().requires_grad_()
    total, _ = linear_cross_entropy(turned, weight, targets)
    once = torch.autograd.grad(total, (turned, weight), retain_graph=True)
    twice = torch.autograd.grad(total * 2, (turned, weight))
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(2 * a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_the_logits(dtype: torch.dtype, largest_tensor: Callable[..., Any]) -> None:
    T, chunk = 250, 16
    hidden, weight, targets = make_inputs(T, dtype)
    # An operator hides what it does from the mode, so the forward is called underneath it.
    with torch.no_grad(), largest_tensor(apart=T * D) as seen:
        eager.forward(hidden, weight, targets, 0.1, chunk, True, True)
    assert seen.elements == chunk * V < T * V / 15


def test_chunks_fit_their_bytes(monkeypatch) -> None:
    for dtype, has_bf16, size in (
        (torch.float32, True, 4),
        (torch.bfloat16, True, 2),
        (torch.bfloat16, False, 4),
    ):
        monkeypatch.setattr(products, "MULTIPLIES_BF16", has_bf16)
        tokens = eager.chunk_size(torch.empty(0, D, dtype=dtype), 32000)
        assert 63 << 20 < tokens * 32000 * size <= 64 << 20
    assert eager.chunk_size(torch.empty(0, D), 1 << 30) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_formed(dtype: torch.dtype) -> None:
    hidden, weight, targets = make_inputs(9, dtype)
    operator = torch.ops.plait.linear_cross_entropy
    torch.library.opcheck(operator, (hidden, weight, targets, 0.1, 4, True, True))
    torch.library.opcheck(operator, (hidden.detach(), weight.float(), targets, 0.0, 4, False, True))
    torch.library.opcheck(operator, (hidden.detach(), weight.detach(), targets, 0.0, 4, False, False))
    _, _, dhidden, dweight = operator(hidden.detach(), weight.detach(), targets, 0.1, 4, True, True)
    scale = torch.tensor(0.3)
    torch.library.opcheck(torch.ops.plait.linear_cross_entropy_backward, (scale, dhidden, dweight, dtype))


def test_operations_are_counted() -> None:
    hidden, weight, targets = make_inputs(9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * 9 * D * V
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * D * V


def test_wrong_inputs_are_named() -> None:
    hidden, weight, targets = make_inputs(9)
    with pytest.raises(ValueError, match=r"targets \(8,\)"):
        linear_cross_entropy(hidden, weight, targets[:8])
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
