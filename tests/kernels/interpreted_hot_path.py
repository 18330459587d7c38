"""The Triton forms in Triton's interpreter, against naive.py; test_hot_path_triton.py runs this file.

Blocks are tiny (the table that the parent writes), so that every loop goes round and every edge is ragged.
fp32 is compared with the specification in float64; 2e-5 leaves room for sums of some hundred terms in fp32.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels import activation, convolution, experts, normalization
from plait.kernels.activation import naive as activation_naive
from plait.kernels.convolution import naive as convolution_naive
from plait.kernels.cross_entropy import VocabularyShard, linear_cross_entropy, token_cross_entropy
from plait.kernels.cross_entropy import naive as cross_entropy_naive
from plait.kernels.experts import experts_naive
from plait.kernels.forms import form_of
from plait.kernels.normalization import naive as normalization_naive
from plait.kernels.normalization import split_eager

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check(
    fast: Callable[..., Any],
    slow: Callable[..., Any],
    inputs: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Outputs and all gradients as the specification has them, and the same bits when run again."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in given]
    assert form_of(given[0]) == "triton"
    got, wanted = fast(*given), slow(*exact)
    flow = torch.randn(got.shape).to(dtype)
    gradients = torch.autograd.grad(got, given, flow)
    wanted_gradients = torch.autograd.grad(wanted, exact, flow.double())
    for a, b in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        assert a.dtype == dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * scale)
    again = fast(*given)
    assert torch.equal(again, got)
    for a, b in zip(torch.autograd.grad(again, given, flow), gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("K", "B", "L", "C", "ids", "halo", "bias", "dtype"),
    [
        (4, 2, 11, 17, "many", True, True, torch.float32),
        (4, 1, 8, 16, "none", False, True, torch.float32),
        (4, 2, 2, 5, "later", True, True, torch.float32),
        (3, 2, 5, 3, "every", True, False, torch.float32),
        (2, 1, 1, 3, "none", True, True, torch.float32),
        (4, 1, 9, 5, "many", True, True, torch.bfloat16),
    ],
)
def test_convolution(
    K: int, B: int, L: int, C: int, ids: str, halo: bool, bias: bool, dtype: torch.dtype
) -> None:
    documents = {
        "none": None,
        "many": (torch.rand(B, L) < 0.3).long().cumsum(1),
        "every": torch.arange(L).expand(B, L),
        "later": torch.full((B, L), 1).cumsum(1).clamp_max(2),
    }[ids]
    inputs = [torch.randn(B, L, 2 * C)[..., :C], torch.randn(C, K)]
    inputs += [torch.randn(C)] if bias else []
    inputs += [torch.randn(B, K - 1, C)] if halo else []

    def call(function: Callable[..., Tensor], silu: str | None) -> Callable[..., Tensor]:
        def called(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
            return function(
                x,
                weight,
                rest[0] if bias else None,
                halo_BKC=rest[-1] if halo else None,
                document_ids_BL=documents,
                activation=silu,
            )

        return called

    for silu in ("silu", None) if K == 3 else ("silu",):
        check(
            call(convolution.causal_convolution, silu),
            call(convolution_naive.causal_convolution, silu),
            inputs,
            dtype,
        )


def test_convolution_leaves_other_documents_alone() -> None:
    """Not a bit of a document changes with what stands in another, infinities included."""
    x, weight, bias = torch.randn(1, 12, 5), torch.randn(5, 4), torch.randn(5)
    documents = (torch.arange(12)[None] >= 7).long()
    x.requires_grad_()
    other = x.detach().clone()
    other[:, :7] = torch.inf
    other.requires_grad_()
    outputs = []
    for inputs in (x, other):
        y = convolution.causal_convolution(inputs, weight, bias, document_ids_BL=documents)[:, 7:]
        outputs.append((y, torch.autograd.grad(y, inputs, torch.ones_like(y))[0][:, 7:]))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(
    ("T", "D", "groups", "dtype"),
    [(7, 33, 1, torch.float32), (1, 64, 1, torch.float32), (37, 5, 1, torch.bfloat16)],
)
def test_rms_norm(T: int, D: int, groups: int, dtype: torch.dtype) -> None:
    check(
        lambda x, w: normalization.rms_norm(x, w, 1e-5),
        lambda x, w: normalization_naive.rms_norm(x, w, 1e-5),
        [torch.randn(T, D), torch.randn(D)],
        dtype,
    )


def added(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    total, normed = normalization.add_rms_norm(x, y, weight, 1e-5)
    return torch.cat([total, normed])


def added_naively(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    total = x + y
    return torch.cat([total, normalization_naive.rms_norm(total, weight, 1e-5)])


@pytest.mark.parametrize(
    ("T", "D", "dtype"), [(7, 33, torch.float32), (1, 64, torch.float32), (9, 20, torch.float16)]
)
def test_sum_and_its_norm(T: int, D: int, dtype: torch.dtype) -> None:
    check(added, added_naively, [torch.randn(T, D), torch.randn(T, D), torch.randn(D)], dtype)
    # Where nobody asks for the sum, its gradient is the norm's alone.
    x, y, weight = torch.randn(T, D, requires_grad=True), torch.randn(T, D), torch.randn(D)
    wanted = torch.autograd.grad(normalization.rms_norm(x + y, weight, 1e-5).sum(), x)
    got = torch.autograd.grad(normalization.add_rms_norm(x, y, weight, 1e-5)[1].sum(), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((2, 9, 40), 2, torch.float32),
        ((13, 33), 3, torch.float32),
        ((5, 64), 1, torch.float32),
        ((7, 48), 4, torch.float16),
    ],
)
def test_gated_rms_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    check(
        lambda x, z, w: normalization.gated_rms_norm(x, z, w, 1e-5, groups),
        lambda x, z, w: normalization_naive.gated_rms_norm(x, z, w, 1e-5, groups),
        [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])],
        dtype,
    )


def test_a_group_that_ranks_share() -> None:
    """Each half of the channels, given the other half's sums, makes its half of the whole."""
    T, D = 9, 42
    x, z, w, dy = torch.randn(T, D), torch.randn(T, D), torch.randn(D), torch.randn(T, D)
    whole = [t.double().requires_grad_() for t in (x, z, w)]
    wanted = normalization_naive.gated_rms_norm(*whole, eps=1e-5, num_groups=1)
    wanted_gradients = torch.autograd.grad(wanted, whole, dy.double())
    inner = D // 3
    for mine, other in ((slice(inner), slice(inner, D)), (slice(inner, D), slice(inner))):
        theirs = [t.double() for t in (x[:, other], z[:, other], w[other])]
        squares = split_eager.squares(*theirs[:2])
        r = torch.rsqrt((squares + split_eager.squares(x[:, mine].double(), z[:, mine].double())) / D + 1e-5)
        sums = [squares[:, 0], split_eager.dot_products(dy[:, other].double(), *theirs, r_T11=r)[:, 0]]
        own = [t.contiguous().requires_grad_() for t in (x[:, mine], z[:, mine], w[mine])]
        y = normalization.gated_rms_norm_split(
            *own,
            eps=1e-5,
            width=D,
            sum_over_ranks=lambda mine_T1, sums=sums: (mine_T1.double() + sums.pop(0)).float(),
        )
        gradients = torch.autograd.grad(y, own, dy[:, mine])
        torch.testing.assert_close(y.double(), wanted[:, mine], rtol=0, atol=2e-5)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(a.double(), b[..., mine], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype) -> None:
    for shape in ((3, 50), (1,), (0, 4)):
        x, up = torch.randn(shape), torch.randn(shape)
        if 0 in shape:
            assert activation.squared_relu(x.requires_grad_()).shape == shape
            continue
        check(activation.squared_relu, activation_naive.squared_relu, [x], dtype)
        check(activation.swiglu, activation_naive.swiglu, [x, up], dtype)
    assert activation.squared_relu(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize(
    ("T", "K", "D", "dtype"),
    [(5, 3, 37, torch.float32), (1, 1, 16, torch.float32), (3, 2, 20, torch.bfloat16)],
)
def test_experts(T: int, K: int, D: int, dtype: torch.dtype) -> None:
    """Through experts of which some get nothing."""
    E = 7
    chosen = torch.stack([torch.randperm(E - 2)[:K] for _ in range(T)])
    routing = experts.sort_by_expert(chosen, E)
    factor = 1 + torch.arange(E - 2) / 8

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        rows = (
            experts.dispatch(x, routing)
            * factor.to(x.dtype).repeat_interleave(routing.counts_E[:-2])[:, None]
        )
        return experts.combine(rows, weight, routing)

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        matrices = torch.eye(D, dtype=x.dtype).expand(E, D, D)
        up = matrices * torch.cat([factor, factor.new_zeros(2)]).to(x.dtype)[:, None, None]
        return experts_naive(x, chosen, weight, up, matrices, lambda hidden: hidden)

    check(fast, slow, [torch.randn(T, D), torch.rand(T, K)], dtype)


@pytest.mark.parametrize(
    ("T", "E", "top_k", "groups", "top_groups"),
    [(5, 11, 3, 1, 1), (3, 4, 4, 1, 1), (7, 18, 5, 6, 2), (2, 3, 1, 3, 2)],
)
def test_choice_of_experts(T: int, E: int, top_k: int, groups: int, top_groups: int) -> None:
    scores, bias = torch.rand(T, E), torch.randn(E)
    options = {"top_k": top_k, "num_groups": groups, "top_k_groups": top_groups}
    chosen = experts.choose_experts(scores, bias, **options)
    assert torch.equal(chosen, experts.choose_experts_naive(scores, bias, **options))
    # Numbers that are none choose something that exists all the same.
    broken = experts.choose_experts(scores * torch.nan, bias, **options)
    assert broken.min() >= 0
    assert broken.max() < E


@pytest.mark.parametrize("chunk_tokens", [4, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy(z_loss: float, chunk_tokens: int | None) -> None:
    T, D, V = 11, 6, 37
    targets = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < 0.4, -100)
    targets[0], targets[3] = -100, V - 1
    check(
        lambda h, w: linear_cross_entropy(h, w, targets, z_loss=z_loss, chunk_tokens=chunk_tokens)[0],
        lambda h, w: cross_entropy_naive.linear_cross_entropy(h, w, targets, z_loss=z_loss)[0],
        [torch.randn(T, D), torch.randn(V, D)],
    )


def test_cross_entropy_of_no_target_and_of_logits_that_are_infinite() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(21, 4)
    total, cross_entropy = linear_cross_entropy(hidden, weight, torch.full((3,), -100), z_loss=0.1)
    assert total == 0
    assert cross_entropy == 0
    assert torch.equal(torch.autograd.grad(total, hidden)[0], torch.zeros(3, 4))
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 33] = 2.0
    from plait.kernels.cross_entropy.triton import reduce_logits

    assert reduce_logits(logits, torch.tensor([33]), 0).tolist() == [[2.0], [2.0]]


def test_cross_entropy_over_a_vocabulary_shard(run_ranks: Callable[..., list[Any]]) -> None:
    T, D, rows = 7, 5, (18, 3)
    hidden, weight = torch.randn(T, D), torch.randn(sum(rows), D)
    targets = torch.tensor([0, 17, 18, 20, -100, 19, 4])
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = cross_entropy_naive.linear_cross_entropy(*exact, targets_T=targets, z_loss=0.1)[0]
    wanted_hidden, wanted_weight = torch.autograd.grad(wanted, exact)
    ends = [0, rows[0], sum(rows)]

    # The interpreter bears no two threads at once: a rank computes while it has the turn.
    turn = threading.Lock()

    def of_rank(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        def in_turn(mine: Tensor) -> Tensor:
            turn.release()
            gathered = gather(mine)
            turn.acquire()
            return gathered

        with turn:
            return part(rank, in_turn)

    def part(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        own = weight[ends[rank] : ends[rank + 1]].clone().requires_grad_()
        whole = hidden.clone().requires_grad_()
        shard = VocabularyShard(first=ends[rank], rows=max(rows), gather=gather)
        total, _ = linear_cross_entropy(whole, own, targets, z_loss=0.1, chunk_tokens=3, shard=shard)
        losses = token_cross_entropy(hidden, own, targets, shard=shard)
        return total.detach(), losses, *torch.autograd.grad(total, (whole, own))

    (total, losses, *first), (other_total, other_losses, *second) = run_ranks(2, of_rank)
    assert torch.equal(total, other_total)
    assert torch.equal(losses, other_losses)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=0)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close((first[0] + second[0]).double(), wanted_hidden, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat([first[1], second[1]]).double(), wanted_weight, rtol=0, atol=2e-5)


def test_float64_stays_with_torch() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    assert form_of(x) == "torch"
    wanted = normalization_naive.rms_norm(x, x[0], 1e-5)
    torch.testing.assert_close(normalization.rms_norm(x, x[0], 1e-5), wanted, rtol=1e-12, atol=1e-12)


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows of a strided view lie 2³¹ elements apart; the memory between them is never touched."""
    far = 1 << 31
    storage = torch.UntypedStorage(2 * (far + 3 * 4))
    base = torch.empty(0, dtype=torch.bfloat16).set_(storage)
    x = base.as_strided((1, 2, 4), (far, far, 1))
    values = torch.randn(1, 2, 4, dtype=torch.bfloat16)
    x.copy_(values)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    got = convolution.causal_convolution(x, weight, bias)
    assert torch.equal(got, convolution.causal_convolution(values, weight, bias))
    rows = base.as_strided((2, 4), (far, 1))
    from plait.kernels.cross_entropy.triton import reduce_logits, write_gradient

    targets = torch.tensor([1, 2])
    wanted = values[0].clone()
    lse = reduce_logits(wanted, targets, 0)
    assert torch.equal(reduce_logits(rows, targets, 0), lse)
    write_gradient(wanted, targets, lse[0], 0.0, 0)
    write_gradient(rows, targets, lse[0], 0.0, 0)
    assert torch.equal(rows, wanted)
