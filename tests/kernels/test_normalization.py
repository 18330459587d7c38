"""RMSNorm and the gated RMSNorm against their specification: outputs and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.kernels.normalization import add_rms_norm, gated_rms_norm, naive, rms_norm

EPS, GROUPS, D = 1e-5, 4, 24
Norm = Callable[..., Tensor]


def arguments(gated: bool) -> tuple[tuple[Norm, Norm], tuple[float | int, ...]]:
    if gated:
        return (gated_rms_norm, naive.gated_rms_norm), (EPS, GROUPS)
    return (rms_norm, naive.rms_norm), (EPS,)


def make_inputs(gated: bool, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [shape, shape, shape[-1:]] if gated else [shape, shape[-1:]]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.fixture(params=[False, True], ids=["plain", "gated"])
def gated(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("shape", [(D,), (1, D), (2, 3, D), (63, D), (5, 13, D), (250, D)])
def test_matches_the_specification(
    gated: bool, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.kernels.normalization.eager.block_rows", lambda n, elements, device: rows)
    (form, specification), constants = arguments(gated)
    inputs = make_inputs(gated, shape)
    got, expected = form(*inputs, *constants), specification(*inputs, *constants)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck(gated: bool) -> None:
    (form, _), constants = arguments(gated)
    torch.autograd.gradcheck(lambda *tensors: form(*tensors, *constants), make_inputs(gated, (3, D)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(gated: bool, dtype: torch.dtype) -> None:
    (form, specification), constants = arguments(gated)
    inputs = make_inputs(gated, (250, D), dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, expected = form(*inputs, *constants), specification(*exact, *constants)
    dy = torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    # One rounding to bf16, 2^-8; in fp32 the sums over 24 channels and 250 tokens, some tens of 2^-24. The
    # two terms of dx may cancel, so its error is measured against its largest element.
    tolerance = 2**-8 * 1.01 if dtype == torch.bfloat16 else 5e-6
    for a, b in zip((got, *gradients), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        floor = 5e-6 * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=floor)


def test_weight_may_be_wider_than_the_activations(gated: bool) -> None:
    (form, _), constants = arguments(gated)
    *activations, weight = make_inputs(gated, (5, D), torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    got = form(*activations, weight, *constants)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, form(*activations, weight.bfloat16(), *constants))
    (dweight,) = torch.autograd.grad(got.float().sum(), weight)
    assert dweight.dtype == torch.float32


def test_zeros_stay_finite(gated: bool) -> None:
    (form, _), constants = arguments(gated)
    inputs = [torch.zeros_like(tensor, requires_grad=True) for tensor in make_inputs(gated, (3, D))]
    y = form(*inputs, *constants)
    assert torch.equal(y, torch.zeros_like(y))
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_any_strides(gated: bool) -> None:
    (form, _), constants = arguments(gated)
    *activations, weight = make_inputs(gated, (4, 6, D))
    turned = [tensor.transpose(0, 1) for tensor in activations]
    got = form(*turned, weight, *constants)
    assert torch.equal(got.transpose(0, 1), form(*activations, weight, *constants))
    expanded = torch.autograd.grad(got.sum(), weight)
    full = torch.autograd.grad(form(*turned, weight, *constants), weight, torch.ones_like(got))
    assert torch.equal(expanded[0], full[0])


def test_tokens_do_not_touch_each_other(gated: bool) -> None:
    (form, _), constants = arguments(gated)
    *activations, weight = make_inputs(gated, (65, D), torch.float32)
    disturbed = [tensor.detach().clone() for tensor in activations]
    for tensor in disturbed:
        tensor[:20], tensor[41:] = torch.nan, 7.0
    y, other = form(*activations, weight, *constants), form(*disturbed, weight, *constants)
    assert torch.equal(y[20:41], other[20:41])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_formed(gated: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(gated, (2, 3, D), dtype)
    detached = [tensor.detach() for tensor in inputs]
    dy, _, constants = torch.randn_like(detached[0]), *arguments(gated)
    if gated:
        torch.library.opcheck(torch.ops.plait.gated_rms_norm, (*inputs, *constants))
        _, r = torch.ops.plait.gated_rms_norm(*detached, *constants)
        torch.library.opcheck(torch.ops.plait.gated_rms_norm_backward, (dy, *detached, r))
    else:
        torch.library.opcheck(torch.ops.plait.rms_norm, (*inputs, *constants))
        _, r = torch.ops.plait.rms_norm(*detached, *constants)
        torch.library.opcheck(torch.ops.plait.rms_norm_backward, (dy, *detached, r))


@pytest.mark.parametrize("asked", [(True, True), (False, True), (True, False)])
def test_a_sum_and_its_norm(asked: tuple[bool, bool]) -> None:
    """Whether the sum, the norm or both of them go on to a loss."""
    x, y, weight = (torch.randn(*shape, D, dtype=torch.float64) for shape in ((5, 3), (5, 3), ()))
    inputs = [tensor.requires_grad_() for tensor in (x, y, weight)]

    def losses(total: Tensor, normed: Tensor) -> Tensor:
        return sum(
            (t.square().sum() for t, wanted in zip((total, normed), asked, strict=True) if wanted),
            x.new_zeros(()),
        )

    got = add_rms_norm(x, y, weight, EPS)
    expected = x + y, naive.rms_norm(x + y, weight, EPS)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(losses(*got), inputs, allow_unused=True)
    for a, b in zip(
        gradients, torch.autograd.grad(losses(*expected), inputs, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.library.opcheck(torch.ops.plait.add_rms_norm, (*inputs, EPS))
    with pytest.raises(ValueError, match=r"torch.float64, y \(5, 3, 24\) torch.float32"):
        add_rms_norm(x, y.float(), weight, EPS)


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(3, D)
    with pytest.raises(ValueError, match=r"weight is \(23,\)"):
        rms_norm(x, torch.ones(D - 1), EPS)
    with pytest.raises(ValueError, match=r"z \(2, 24\)"):
        gated_rms_norm(x, x[:2], torch.ones(D), EPS, 1)
    with pytest.raises(ValueError, match="num_groups = 5 does not divide 24"):
        gated_rms_norm(x, x, torch.ones(D), EPS, 5)
