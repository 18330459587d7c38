"""The causal convolution against its specification: outputs, every gradient, documents, halo."""

import pytest
import torch
from torch import Tensor

from plait.kernels.convolution import causal_convolution, naive

B, C = 3, 5
# Each length has a different place to end in a block, in a document and among the taps.
LENGTHS = [1, 2, 3, 63, 65, 250]


def make_inputs(L: int, K: int, dtype: torch.dtype = torch.float64, C: int = C) -> dict[str, Tensor]:
    shapes = {"x": (B, L, C), "weight": (C, K), "bias": (C,), "halo": (B, K - 1, C)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


def make_documents(L: int, probability: float = 0.3) -> Tensor:
    """Some rows continue the halo's document, some start afresh at their first token."""
    return (torch.rand(B, L) < probability).long().cumsum(1)


def call(form, inputs: dict[str, Tensor], ids: Tensor | None, activation: str | None = "silu") -> Tensor:
    x, weight, bias, halo = inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("halo")
    return form(x, weight, bias, halo_BKC=halo, document_ids_BL=ids, activation=activation)


def assert_same(inputs: dict[str, Tensor], ids: Tensor | None, activation: str | None = "silu") -> None:
    got = call(causal_convolution, inputs, ids, activation)
    expected = call(naive.causal_convolution, inputs, ids, activation)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(
        expected, list(inputs.values()), dy, allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(inputs, torch.autograd.grad(got, list(inputs.values()), dy), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.fixture(params=[2, 7])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two tokens, fewer than the taps reach, or seven, so that short sequences cross many."""
    size = request.param
    monkeypatch.setattr(
        "plait.kernels.convolution.eager.block_rows", lambda n, elements, device: min(n, size)
    )


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("L", LENGTHS)
def test_matches_the_specification(L: int, K: int) -> None:
    inputs = make_inputs(L, K)
    assert_same(inputs, None)
    assert_same(inputs, make_documents(L))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("L", LENGTHS)
def test_blocks_join(L: int, K: int) -> None:
    inputs = make_inputs(L, K)
    assert_same(inputs, None)
    assert_same(inputs, make_documents(L))


@pytest.mark.parametrize("present", [("x", "weight"), ("x", "weight", "bias"), ("x", "weight", "halo")])
@pytest.mark.parametrize("activation", ["silu", None])
def test_without_bias_halo_or_activation(present: tuple[str, ...], activation: str | None) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(9, 4).items() if name in present}
    assert_same(inputs, make_documents(9), activation)


def test_every_token_its_own_document() -> None:
    ids = torch.arange(1, 10).expand(B, 9)
    inputs = make_inputs(9, 4)
    assert_same(inputs, ids)
    alone = torch.nn.functional.silu(inputs["bias"] + inputs["weight"][:, -1] * inputs["x"])
    torch.testing.assert_close(call(causal_convolution, inputs, ids), alone, rtol=1e-14, atol=1e-14)


def test_gradcheck() -> None:
    inputs, ids = make_inputs(6, 4), make_documents(6)
    names = list(inputs)
    torch.autograd.gradcheck(
        lambda *tensors: call(causal_convolution, dict(zip(names, tensors, strict=True)), ids),
        list(inputs.values()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs, ids = make_inputs(65, 4, dtype), make_documents(65, 0.1)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    got, expected = call(causal_convolution, inputs, ids), call(naive.causal_convolution, exact, ids)
    assert got.dtype == dtype
    dy = torch.randn_like(got)
    gradients = torch.autograd.grad(got, list(inputs.values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    # One rounding to bf16, 2^-8; in fp32 the sums over 195 tokens, a few hundred units of 2^-24.
    tolerance = 2**-8 * 1.01 if dtype == torch.bfloat16 else 2e-5
    for a, b in zip((got, *gradients), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("size", [2, 7, 1000])
def test_documents_do_not_touch_each_other(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document gives and gets does not change a bit with the others, even where they hold NaN."""
    monkeypatch.setattr(
        "plait.kernels.convolution.eager.block_rows", lambda n, elements, device: min(n, size)
    )
    L = 65
    ids = torch.zeros(B, L, dtype=torch.int64)
    ids[:, 20:41], ids[:, 41:] = 1, 2
    inputs, disturbed = make_inputs(L, 4, torch.float32, 64), make_inputs(L, 4, torch.float32, 64)
    dy = torch.randn(B, L, 64)
    other_dy = torch.full_like(dy, torch.nan)
    other_dy[:, 20:41] = dy[:, 20:41]
    with torch.no_grad():
        disturbed["x"].fill_(torch.nan)
        disturbed["halo"].fill_(torch.inf)
        for name in ("weight", "bias"):
            disturbed[name].copy_(inputs[name])
        disturbed["x"][:, 20:41] = inputs["x"][:, 20:41]
    outputs = []
    for tensors, gradient in ((inputs, dy), (disturbed, other_dy)):
        y = call(causal_convolution, tensors, ids)
        (dx,) = torch.autograd.grad(y, tensors["x"], gradient)
        outputs.append((y[:, 20:41], dx[:, 20:41]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_a_split_sequence_with_halos_equals_the_whole() -> None:
    inputs, L, cut = make_inputs(20, 4), 20, 9
    ids = make_documents(L, 0.2)
    whole = call(causal_convolution, inputs, ids)
    left = {**inputs, "x": inputs["x"][:, :cut]}
    right = {**inputs, "x": inputs["x"][:, cut:], "halo": inputs["x"][:, cut - 3 : cut]}
    # Renumbered as the second shard sees it: 0 continues what came before.
    parts = [
        call(causal_convolution, left, ids[:, :cut]),
        call(causal_convolution, right, ids[:, cut:] - ids[:, cut - 1 : cut]),
    ]
    joined = torch.cat(parts, 1)
    dy = torch.randn_like(whole)
    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(joined, list(inputs.values()), dy),
        torch.autograd.grad(whole, list(inputs.values()), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_any_strides() -> None:
    inputs, ids = make_inputs(10, 4), make_documents(10)
    wide = torch.randn(B, 10, 3 * C, dtype=torch.float64)
    turned = torch.randn(C, B, 10, dtype=torch.float64).permute(1, 2, 0)
    for x in (wide[..., C : 2 * C], turned, wide[:, :1, :C].expand(B, 10, C)):
        got = call(causal_convolution, {**inputs, "x": x}, ids)
        assert torch.equal(got, call(causal_convolution, {**inputs, "x": x.contiguous()}, ids))


def test_operators_are_well_formed() -> None:
    inputs, ids = make_inputs(6, 4), make_documents(6)
    everything = (inputs["x"], inputs["weight"], inputs["bias"], inputs["halo"], ids)
    little = (inputs["x"].detach().transpose(0, 1), inputs["weight"], None, None, None)
    for tensors in (everything, little):
        detached = [None if t is None else t.detach() for t in tensors]
        torch.library.opcheck(torch.ops.plait.causal_convolution, (*tensors, True))
        dy = torch.randn_like(tensors[0])
        torch.library.opcheck(torch.ops.plait.causal_convolution_backward, (dy, *detached, True))


def test_wrong_shapes_are_named() -> None:
    x, weight = torch.randn(B, 6, C), torch.randn(C, 4)
    with pytest.raises(ValueError, match=r"halo is \(3, 4, 5\), not \(3, 3, 5\)"):
        causal_convolution(x, weight, None, halo_BKC=torch.randn(B, 4, C))
    with pytest.raises(ValueError, match="no token"):
        causal_convolution(x[:, :0], weight, None)
    with pytest.raises(ValueError, match="'relu'"):
        causal_convolution(x, weight, None, activation="relu")  # pyright: ignore[reportArgumentType]
