"""The activations against their specification: outputs, gradients, and what is kept in between."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.kernels.activation import naive, squared_relu, swiglu

Activation = Callable[..., Tensor]
FORMS = {"squared_relu": (squared_relu, naive.squared_relu, 1), "swiglu": (swiglu, naive.swiglu, 2)}


@pytest.fixture(params=list(FORMS))
def forms(request: pytest.FixtureRequest) -> tuple[Activation, Activation, int]:
    return FORMS[request.param]


def make_inputs(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("shape", [(), (1,), (3, 65), (2, 5, 7)])
def test_matches_the_specification(forms: tuple[Activation, Activation, int], shape: tuple[int, ...]) -> None:
    form, specification, count = forms
    inputs = make_inputs(count, shape)
    got, expected = form(*inputs), specification(*inputs)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck(forms: tuple[Activation, Activation, int]) -> None:
    form, _, count = forms
    torch.autograd.gradcheck(form, make_inputs(count, (3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(forms: tuple[Activation, Activation, int], dtype: torch.dtype) -> None:
    form, specification, count = forms
    inputs = make_inputs(count, (40, 65), dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, expected = form(*inputs), specification(*exact)
    dy = torch.randn_like(got)
    gradients, wanted = (
        torch.autograd.grad(got, inputs, dy),
        torch.autograd.grad(expected, exact, dy.double()),
    )
    # At most two roundings, 2^-8 each in bf16; in fp32 the error of exp beside two of 2^-24. The slope of
    # SiLU has a zero, near which only the absolute error is small.
    tolerance = 2 * 2**-8 * 1.01 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip((got, *gradients), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=1e-6)


def test_squared_relu_rounds_once() -> None:
    """The square of a bf16 number, and twice its product with another, are exact in fp32."""
    x = torch.randn(1000, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(1000, dtype=torch.bfloat16)
    y = squared_relu(x)
    assert torch.equal(y, (x.float().relu() ** 2).bfloat16())
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], (2 * x.float().relu() * dy.float()).bfloat16())


def test_large_numbers_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    y = swiglu(gate, up)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(dgate, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(dup, y.detach())


def test_nothing_is_saved_but_the_inputs(forms: tuple[Activation, Activation, int]) -> None:
    form, _, count = forms
    inputs = make_inputs(count, (3, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        form(*inputs)
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in inputs)


def test_any_strides(forms: tuple[Activation, Activation, int]) -> None:
    form, _, count = forms
    inputs = make_inputs(count, (6, 8))
    turned = [tensor.t() for tensor in inputs]
    got = form(*turned)
    assert got.is_contiguous()
    assert torch.equal(got.t(), form(*inputs))
    expanded = torch.autograd.grad(got.sum(), inputs)
    for a, b in zip(expanded, torch.autograd.grad(form(*inputs).sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_operators_are_well_formed(forms: tuple[Activation, Activation, int]) -> None:
    form, _, count = forms
    operator = getattr(torch.ops.plait, form.__name__)
    backward = getattr(torch.ops.plait, f"{form.__name__}_backward")
    for inputs in (make_inputs(count, (3, 5)), [t.t() for t in make_inputs(count, (3, 5), torch.bfloat16)]):
        detached = [tensor.detach() for tensor in inputs]
        torch.library.opcheck(operator, tuple(t.requires_grad_() for t in detached))
        torch.library.opcheck(backward, (torch.randn_like(detached[0]), *[t.detach() for t in detached]))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"up \(4,\)"):
        swiglu(torch.ones(3), torch.ones(4))
