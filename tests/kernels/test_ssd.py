"""SSD against its recurrence: outputs, final states and every gradient."""

import math

import pytest
import torch

from plait.kernels.ssd import begin, finish, ssd, ssd_naive

BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 3, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(length, groups, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values = (
        normal(BATCH, length, HEADS, HEAD_DIM),
        normal(BATCH, length, HEADS),
        -torch.exp(normal(HEADS)),
        normal(BATCH, length, groups, STATE),
        normal(BATCH, length, groups, STATE),
        normal(HEADS),
        normal(HEADS),
        normal(BATCH, HEADS, HEAD_DIM, STATE),
    )
    tensors = dict(zip(NAMES, values, strict=True))
    for name, value in tensors.items():
        exact = name in ("A", "D", "dt_bias", "initial_state", "dt")
        value = value.to(torch.promote_types(dtype, torch.float32) if exact else dtype)
        tensors[name] = value.requires_grad_()
    return tensors


def documents(length):
    """Cuts at chunk borders and elsewhere, a document of one token, and rows that differ."""
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, cuts in enumerate(((1, 16, 17, 40, 64, 200), (8, 48))):
        for cut in cuts:
            ids[row, cut:] += 1
    return ids


def run(function, tensors, ids, limit, **options):
    t = tensors
    y, state = function(
        t["x"],
        t["dt"],
        t["A"],
        t["B"],
        t["C"],
        D_H=t["D"],
        dt_bias_H=t["dt_bias"],
        dt_limit=limit,
        initial_state_BHPN=t["initial_state"],
        document_ids_BL=ids,
        **options,
    )
    return y, state


def gradients(y, state, tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    grad_y = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    grad_state = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state.dtype)
    return torch.autograd.grad((y, state), list(tensors.values()), (grad_y, grad_state))


def assert_all_close(actual, expected, tolerance):
    for name, a, e in zip(("y", "state", *NAMES), actual, expected, strict=True):
        scale = e.abs().max().item() + 1e-300
        error = (a.double() - e.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance}"


@pytest.mark.parametrize("length", [1, 63, 65, 250])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_agrees_with_the_recurrence(length, groups, packed):
    tensors = inputs(length, groups)
    ids = documents(length) if packed else None
    limit = (0.3, 1.5) if packed else (0.0, math.inf)
    expected = run(ssd_naive, tensors, ids, limit)
    expected = (*expected, *gradients(*expected, tensors))
    for chunk_size in (16, 64):
        actual = run(ssd, tensors, ids, limit, chunk_size=chunk_size)
        actual = (*actual, *gradients(*actual, tensors))
        assert_all_close(actual, expected, 1e-10)


def test_optional_inputs_may_be_missing():
    tensors = inputs(70, 2)
    t = tensors
    some = {k: t[k] for k in ("x", "dt", "A", "B", "C")}
    expected = ssd_naive(*some.values())
    actual = ssd(*some.values(), chunk_size=32)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    for a, e in zip(gradients(*actual, some), gradients(*expected, some), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_follows_float64(dtype, tolerance):
    # bf16 keeps 8 bits of x, B and C and rounds y and their gradients once: 2^-8 of the largest, times
    # a few for sums over heads and tokens. fp32 keeps 24, and the gradients of dt_bias and A sum 500
    # terms of both signs, which cancel to a hundredth of their sizes.
    low = inputs(250, 2, dtype)
    exact = {name: value.detach().double().requires_grad_() for name, value in low.items()}
    expected = run(ssd_naive, exact, documents(250), (0.0, math.inf))
    expected = (*expected, *gradients(*expected, exact))
    actual = run(ssd, low, documents(250), (0.0, math.inf))
    actual = (*actual, *gradients(*actual, low))
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_all_close(actual, expected, tolerance)


class Neighbours:
    """An exchange between the shards of one process, in the place of ranks: a serial prefix."""

    def __init__(self, shards):
        self.shards, self.sent, self.log = shards, {}, []

    def for_shard(self, rank):
        def exchange(log_decay, state, /, *, reverse):
            self.sent[reverse, rank] = (log_decay, state)
            self.log.append(("send", reverse, rank))

            def wait():
                self.log.append(("wait", reverse, rank))
                others = range(self.shards - 1, rank, -1) if reverse else range(rank)
                total = torch.zeros_like(state)
                for other in others:
                    decay, own = self.sent[reverse, other]
                    total = torch.exp(decay)[..., None, None] * total + own
                return total

            return wait

        return exchange


def sharded(tensors, ids, cuts, limit, chunk_size):
    """Begin every shard, then finish every shard; document ids renumbered as on ranks."""
    edges = list(zip([0, *cuts], [*cuts, tensors["x"].shape[1]], strict=True))
    neighbours = Neighbours(len(edges))
    pending, outputs = [], []
    for rank, (lo, hi) in enumerate(edges):
        local = None
        if ids is not None:
            before = ids[:, lo - 1 : lo] if lo else torch.zeros_like(ids[:, :1])
            local = ids[:, lo:hi] - before
        pending.append(
            begin(
                tensors["x"][:, lo:hi],
                tensors["dt"][:, lo:hi],
                tensors["A"],
                tensors["B"][:, lo:hi],
                dt_bias_H=tensors["dt_bias"],
                dt_limit=limit,
                initial_state_BHPN=tensors["initial_state"] if rank == 0 else None,
                document_ids_BL=local,
                chunk_size=chunk_size,
                exchange=neighbours.for_shard(rank),  # pyright: ignore[reportArgumentType]
            )
        )
    for (lo, hi), one in zip(edges, pending, strict=True):
        outputs.append(finish(one, tensors["C"][:, lo:hi], D_H=tensors["D"]))
    return torch.cat([y for y, _ in outputs], dim=1), outputs[-1][1], neighbours.log


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("cuts", [(125,), (3, 17, 130)])
def test_begin_and_finish_with_an_exchange_agree_with_one_call(packed, cuts):
    tensors = inputs(250, 2)
    ids = documents(250) if packed else None
    expected = run(ssd, tensors, ids, (0.0, math.inf), chunk_size=16)
    expected = (*expected, *gradients(*expected, tensors))
    y, state, log = sharded(tensors, ids, cuts, (0.0, math.inf), 16)
    actual = (y, state, *gradients(y, state, tensors))
    assert_all_close(actual, expected, 1e-12)
    for reverse in (False, True):
        order = [what for what, direction, _ in log if direction is reverse]
        half = len(cuts) + 1
        assert order == ["send"] * half + ["wait"] * half, "all are launched before any is waited for"


def test_a_document_does_not_change_a_bit_of_another():
    tensors = {k: v.detach() for k, v in inputs(250, 2, torch.float32).items()}
    ids = documents(250)
    y, _ = run(ssd, tensors, ids, (0.0, math.inf))
    for name in ("x", "dt", "B", "C"):
        changed = dict(tensors)
        changed[name] = tensors[name].clone()
        hit = ids == 3
        changed[name][hit] *= -1.5
        other, _ = run(ssd, changed, ids, (0.0, math.inf))
        assert torch.equal(other[~hit], y[~hit])
        assert not torch.equal(other[hit], y[hit])


def test_strong_decay_neither_overflows_nor_loses_the_gradient():
    tensors = inputs(250, 1)
    with torch.no_grad():
        tensors["A"].mul_(200)
    expected = run(ssd_naive, tensors, documents(250), (0.0, math.inf))
    expected = (*expected, *gradients(*expected, tensors))
    actual = run(ssd, tensors, documents(250), (0.0, math.inf))
    actual = (*actual, *gradients(*actual, tensors))
    assert_all_close(actual, expected, 1e-10)


def test_a_scan_is_finished_once():
    t = inputs(8, 1)
    pending = begin(t["x"], t["dt"], t["A"], t["B"])
    finish(pending, t["C"])
    with pytest.raises(RuntimeError, match="begin another"):
        finish(pending, t["C"])


@pytest.mark.parametrize("length", [32, 37])
def test_operators_are_registered_well(length):
    t = {k: v.detach() for k, v in inputs(length, 2, torch.float32).items()}
    ids, initial = documents(length), t["initial_state"]
    ops = torch.ops.plait
    begin_inputs = (t["x"], t["dt"], t["A"], t["B"], t["dt_bias"], ids, 0.0, math.inf, 16)
    dt, log_decay, decay, entering, prefix, total, final = ops.ssd_begin(*begin_inputs)
    finish_inputs = (t["x"], dt, log_decay, t["B"], t["C"], t["D"], entering, prefix, initial, ids)
    back_inputs = (t["x"], t["x"], dt, log_decay, decay, *finish_inputs[3:])
    *_, kept = ops.ssd_finish_backward(*back_inputs, True)
    between = (t["dt_bias"], dt, log_decay, decay, entering, prefix, total, initial, ids)
    given = (t["x"], t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], *between, 0.0, math.inf)
    calls = [
        (ops.ssd_begin, begin_inputs),
        (ops.ssd_finish, finish_inputs),
        (ops.ssd_finish_backward, (*back_inputs, True)),
        (ops.ssd_finish_backward, (*back_inputs, False)),
        (ops.ssd_begin_backward, (kept, final, *given)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    t = inputs(64, 2, torch.float32)
    with FlopCounterMode(display=False) as forward:
        y, _ = ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=16)
    tokens, inner = BATCH * 64, HEADS * HEAD_DIM
    assert forward.get_total_flops() == 2 * tokens * (2 * inner * STATE + 16 * (2 * STATE + inner))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * tokens * (5 * inner * STATE + 16 * (3 * 2 * STATE + 2 * inner))
