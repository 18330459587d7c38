"""The loss where ranks hold rows of the head each, and each token's own, against the whole head's."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from plait.kernels.cross_entropy import (
    VocabularyShard,
    eager,
    linear_cross_entropy,
    naive,
    token_cross_entropy,
)
from plait.kernels.products import product_dtype

D, V = 12, 131
SIZES = [[65, 66], [66, 65], [44, 44, 43], [1, 100, 30]]
Gather = Callable[[Tensor], Tensor]
RunRanks = Callable[..., list[Any]]


@pytest.fixture(params=SIZES, ids=lambda sizes: "+".join(map(str, sizes)))
def sizes(request: pytest.FixtureRequest) -> list[int]:
    return request.param


def make_inputs(
    T: int, dtype: torch.dtype = torch.float64, masked: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < masked, -100)
    return hidden, weight, targets


def shard_of(sizes: list[int], rank: int, gather: Gather) -> VocabularyShard:
    return VocabularyShard([0, *accumulate(sizes)][rank], max(sizes), gather)


def run_sharded(
    run_ranks: RunRanks,
    sizes: list[int],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: float = 1.0,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Each rank's total and cross entropy, and the gradients: hidden's parts added up, weight's in a row."""

    def of_rank(rank: int, gather: Gather) -> tuple[Tensor, ...]:
        whole, rows = (
            tensor.detach().clone().requires_grad_()
            for tensor in (hidden, weight.detach().split(sizes)[rank])
        )
        shard = shard_of(sizes, rank, gather)
        total, cross_entropy = linear_cross_entropy(whole, rows, targets, shard=shard, **options)
        assert not cross_entropy.requires_grad
        return total.detach(), cross_entropy, *torch.autograd.grad(total / divisor, (whole, rows))

    totals, cross_entropies, dhiddens, dweights = zip(*run_ranks(len(sizes), of_rank), strict=True)
    return list(totals), list(cross_entropies), torch.stack(dhiddens).sum(0), torch.cat(dweights)


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("T", [1, 65])
def test_ranks_make_the_whole(
    T: int,
    z_loss: float,
    chunk_tokens: int | None,
    sizes: list[int],
    run_ranks: RunRanks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("eager", "sharded_eager"):
        monkeypatch.setattr(f"plait.kernels.cross_entropy.{name}.block_rows", lambda n, elements, device: 3)
    hidden, weight, targets = make_inputs(T)
    targets[-1] = 130
    totals, cross_entropies, dhidden, dweight = run_sharded(
        run_ranks, sizes, hidden, weight, targets, 7.0, z_loss=z_loss, chunk_tokens=chunk_tokens
    )
    for whole in (naive.linear_cross_entropy, linear_cross_entropy):
        total, cross_entropy = whole(hidden, weight, targets, z_loss=z_loss)
        # The caller divides by the number of targets, so the incoming gradient is not one.
        wanted = torch.autograd.grad(total / 7, (hidden, weight))
        for rank in range(len(sizes)):
            assert totals[rank] == totals[0]
            assert cross_entropies[rank] == cross_entropies[0]
        torch.testing.assert_close(totals[0], total.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cross_entropies[0], cross_entropy, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dhidden, wanted[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dweight, wanted[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [0, 5])
def test_no_target_at_all(T: int, sizes: list[int], run_ranks: RunRanks) -> None:
    hidden, weight, _ = make_inputs(T, torch.bfloat16)
    targets = torch.full((T,), -100)
    totals, cross_entropies, dhidden, dweight = run_sharded(
        run_ranks, sizes, hidden, weight, targets, z_loss=0.1, chunk_tokens=2
    )
    assert all(value.item() == 0.0 for value in (*totals, *cross_entropies))
    assert torch.equal(dhidden, torch.zeros_like(hidden))
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("chunk_tokens", [16, None])
def test_one_exchange_a_chunk(chunk_tokens: int | None, sizes: list[int], run_ranks: RunRanks) -> None:
    """Ranks of unlike sizes, some of which need no gradient, still meet equally often."""
    hidden, weight, targets = make_inputs(65)
    shapes: list[list[tuple[int, ...]]] = [[] for _ in sizes]

    def of_rank(rank: int, gather: Gather) -> None:
        def counted(tensor: Tensor) -> Tensor:
            shapes[rank].append(tuple(tensor.shape))
            return gather(tensor)

        rows = weight.detach().split(sizes)[rank].requires_grad_(rank > 0)
        shard = shard_of(sizes, rank, counted)
        linear_cross_entropy(hidden.detach(), rows, targets, chunk_tokens=chunk_tokens, shard=shard)

    run_ranks(len(sizes), of_rank)
    count = int((targets != -100).sum())
    step = chunk_tokens or count
    assert shapes == [[(2, min(step, count - start)) for start in range(0, count, step)]] * len(sizes)


def test_chunks_are_cut_by_the_largest_shard(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eager.CHUNK_BYTES, "cpu", 5 * 100 * 8)
    hidden, weight, targets = make_inputs(23, masked=0.0)
    tokens: list[list[int]] = [[], [], []]

    def of_rank(rank: int, gather: Gather) -> None:
        def counted(tensor: Tensor) -> Tensor:
            tokens[rank].append(tensor.shape[1])
            return gather(tensor)

        shard = shard_of([1, 100, 30], rank, counted)
        rows = weight.detach().split([1, 100, 30])[rank]
        linear_cross_entropy(hidden.detach(), rows, targets, shard=shard)
        token_cross_entropy(hidden.detach(), rows, targets, shard=shard)

    run_ranks(3, of_rank)
    assert tokens == [[5, 5, 5, 5, 3] * 2] * 3


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16(weight_dtype: torch.dtype, sizes: list[int], run_ranks: RunRanks) -> None:
    hidden, weight, targets = make_inputs(250, torch.bfloat16)
    weight = weight.detach().to(weight_dtype)
    exact = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    totals, _, dhidden, dweight = run_sharded(run_ranks, sizes, hidden, weight, targets, chunk_tokens=64)
    wanted, _ = naive.linear_cross_entropy(*exact, targets)
    assert totals[0].dtype == torch.float32
    assert (dhidden.dtype, dweight.dtype) == (torch.bfloat16, weight_dtype)
    # Logits are rounded to bf16, 2^-8 of values up to about 12; over the tokens the errors average out.
    torch.testing.assert_close(totals[0].double(), wanted.detach(), rtol=2e-3, atol=0)
    for a, b in zip((dhidden, dweight), torch.autograd.grad(wanted, exact), strict=True):
        # A logit's error of up to 12 · 2^-8 moves its probability by 4.7 %, the gradient's sums by less.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


def test_a_probability_that_underflows(run_ranks: RunRanks) -> None:
    """The target's rank knows only logits far below the others', and the loss is still exact."""
    hidden = torch.tensor([[300.0], [300.0]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    totals, _, dhidden, dweight = run_sharded(run_ranks, [2, 1], hidden, weight, torch.tensor([2, 0]))
    assert totals[0].item() == 600.0
    torch.testing.assert_close(dhidden, torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(dweight, torch.tensor([[300.0], [0.0], [-300.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_more_than_a_chunk_of_its_own_logits(
    dtype: torch.dtype, run_ranks: RunRanks, largest_tensor: Callable[..., Any]
) -> None:
    T, chunk, sizes = 250, 32, [44, 44, 43]
    hidden, weight, targets = make_inputs(T, dtype)

    def of_rank(rank: int, gather: Gather) -> int:
        whole, rows = hidden.detach().requires_grad_(), weight.detach().split(sizes)[rank].requires_grad_()
        with largest_tensor(apart=T * D) as seen:
            shard = shard_of(sizes, rank, gather)
            linear_cross_entropy(whole, rows, targets, z_loss=0.1, chunk_tokens=chunk, shard=shard)
        return seen.elements

    assert run_ranks(3, of_rank) == [chunk * size for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operations_are_counted(dtype: torch.dtype, run_ranks: RunRanks) -> None:
    hidden, weight, targets = make_inputs(9, dtype)
    sizes = [44, 44, 43]

    def of_rank(rank: int, gather: Gather) -> int:
        whole = hidden.detach().clone().requires_grad_()
        rows = weight.detach().split(sizes)[rank].clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            shard = shard_of(sizes, rank, gather)
            linear_cross_entropy(whole, rows, targets, shard=shard)[0].backward()
        return counter.get_total_flops()

    count = int((targets != -100).sum())
    assert run_ranks(3, of_rank) == [3 * 2 * count * D * size for size in sizes]


def test_more_rows_than_the_shard_has_are_named() -> None:
    hidden, weight, targets = make_inputs(9)
    shard = VocabularyShard(0, 100, lambda tensor: tensor[None])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: weight \(131, 12\), not 1 to 100 rows"):
        linear_cross_entropy(hidden, weight, targets, shard=shard)
    with pytest.raises(ValueError, match=r"token_cross_entropy: weight \(0, 12\), not 1 to 100 rows"):
        token_cross_entropy(hidden, weight[:0], targets, shard=shard)
    with pytest.raises(ValueError, match=r"token_cross_entropy: .* targets \(8,\)"):
        token_cross_entropy(hidden, weight, targets[:8])


@pytest.mark.parametrize("masked", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("split", [[V], *SIZES], ids=lambda sizes: "+".join(map(str, sizes)))
def test_the_loss_of_each_token(
    split: list[int], chunk: int, masked: float, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(eager.CHUNK_BYTES, "cpu", chunk * max(split) * 8)
    hidden, weight, targets = make_inputs(65, masked=masked)
    wanted = F.cross_entropy(hidden @ weight.t(), targets, reduction="none").detach()

    def of_rank(rank: int, gather: Gather) -> Tensor:
        shard = shard_of(split, rank, gather)
        return token_cross_entropy(hidden, weight.split(split)[rank], targets, shard=shard)

    if split == [V]:
        losses = [token_cross_entropy(hidden, weight, targets)]
    else:
        losses = run_ranks(len(split), of_rank)
    for loss in losses:
        assert not loss.requires_grad
        assert torch.equal(loss, losses[0])
        assert not loss[targets == -100].any()
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)


def test_the_loss_of_each_token_is_fp32_at_least() -> None:
    hidden, weight, targets = make_inputs(250, torch.bfloat16)
    loss = token_cross_entropy(hidden, weight.detach().float(), targets)
    assert loss.dtype == torch.float32
    wide = product_dtype(hidden)
    logits = (hidden.to(wide) @ weight.to(wide).t()).detach().float()
    # The same logits, reduced in fp32: a few roundings of 2^-24 of values up to about 20.
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"), rtol=0, atol=1e-5)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss.sum(), total.detach(), rtol=1e-6, atol=0)
