"""The gated norm of a group that ranks share, against the norm of the whole group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.normalization import gated_rms_norm, gated_rms_norm_split, naive

EPS, D = 1e-5, 24
RunRanks = Callable[..., list[Any]]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, shape, shape[-1:])]


def run_split(run_ranks: RunRanks, inputs: list[Tensor], dy: Tensor, sizes: list[int]) -> list[Tensor]:
    """The output and the gradients of x, z and weight, from ranks that hold ``sizes`` channels each."""

    def of_rank(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        def sum_over_ranks(sums: Tensor) -> Tensor:
            tokens = dy.numel() // dy.shape[-1]
            assert sums.shape == (tokens, 1)
            assert sums.dtype == torch.promote_types(dy.dtype, torch.float32)
            calls.append(rank)
            return gather(sums).sum(0)

        x, z, weight = (t.detach().split(sizes, -1)[rank].clone().requires_grad_() for t in inputs)
        y = gated_rms_norm_split(x, z, weight, EPS, width=sum(sizes), sum_over_ranks=sum_over_ranks)
        return y.detach(), *torch.autograd.grad(y, (x, z, weight), dy.split(sizes, -1)[rank])

    calls: list[int] = []
    results = run_ranks(len(sizes), of_rank)
    assert sorted(calls) == sorted(2 * list(range(len(sizes)))), "once forward, once backward"
    return [torch.cat(parts, -1) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("sizes", [[24], [12, 12], [6, 6, 6, 6], [5, 18, 1]])
@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("shape", [(D,), (1, D), (63, D), (5, 13, D)])
def test_ranks_make_the_whole(
    sizes: list[int],
    shape: tuple[int, ...],
    rows: int,
    run_ranks: RunRanks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plait.kernels.normalization.eager.block_rows", lambda n, elements, device: rows)
    inputs = make_inputs(shape)
    dy = torch.randn(shape, dtype=torch.float64)
    got = run_split(run_ranks, inputs, dy, sizes)
    x, z, weight = inputs
    for whole in (naive.gated_rms_norm, gated_rms_norm):
        y = whole(x, z, weight, EPS, 1)
        for a, b in zip(got, (y, *torch.autograd.grad(y, inputs, dy)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, run_ranks: RunRanks) -> None:
    inputs = make_inputs((250, D), dtype)
    x, z, weight = (tensor.detach().double().requires_grad_() for tensor in inputs)
    dy = torch.randn(250, D, dtype=dtype)
    expected = naive.gated_rms_norm(x, z, weight, EPS, 1)
    wanted = (expected, *torch.autograd.grad(expected, (x, z, weight), dy.double()))
    # As for the whole group: the sums that cross ranks are fp32, so a result is rounded once to bf16.
    tolerance = 2**-8 * 1.01 if dtype == torch.bfloat16 else 5e-6
    for a, b in zip(run_split(run_ranks, inputs, dy, [12, 12]), wanted, strict=True):
        assert a.dtype == dtype
        floor = 5e-6 * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=floor)


def test_one_rank_alone_has_the_bits_of_the_whole(run_ranks: RunRanks) -> None:
    x, z, _ = make_inputs((65, D), torch.bfloat16)
    weight = torch.randn(D, requires_grad=True)
    dy = torch.randn(65, D).bfloat16()
    y = gated_rms_norm(x, z, weight, EPS, 1)
    got = run_split(run_ranks, [x, z, weight], dy, [D])
    for a, b in zip(got, (y, *torch.autograd.grad(y, (x, z, weight), dy)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_any_strides_and_sums_left_alone() -> None:
    x, z, weight = make_inputs((4, 6, D))
    totals = []

    def remember(sums: Tensor) -> Tensor:
        totals.append((sums, sums.clone()))
        return sums

    def run(x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm_split(x, z, weight, EPS, width=D, sum_over_ranks=remember)

    got = run(x.transpose(0, 1), z.transpose(0, 1))
    assert torch.equal(got.transpose(0, 1), run(x, z))
    expanded = torch.autograd.grad(got.sum(), weight)[0]
    full = torch.autograd.grad(run(x, z), weight, torch.ones_like(x))[0]
    torch.testing.assert_close(expanded, full, rtol=1e-12, atol=1e-12)
    for sums, before in totals:
        assert torch.equal(sums, before)


def test_wrong_shapes_are_named() -> None:
    x = torch.randn(3, D)
    with pytest.raises(ValueError, match=r"weight is \(23,\)"):
        gated_rms_norm_split(x, x, torch.ones(D - 1), EPS, width=D, sum_over_ranks=lambda sums: sums)
    with pytest.raises(ValueError, match="width = 12, x has 24 channels"):
        gated_rms_norm_split(x, x, torch.ones(D), EPS, width=12, sum_over_ranks=lambda sums: sums)
