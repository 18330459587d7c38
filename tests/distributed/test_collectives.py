"""Every collective's value, gradient and bytes, by formulas over the ranks' tensors in one process."""

import pytest
import torch
from programs.messages import SEND, drawn

DOUBLE = 8


def formulas(size):
    """Collective -> shape of each rank's tensor, function of all ranks' tensors to all ranks' outputs,
    and the bytes that each rank sends forward and backward."""
    send = [row[:size] for row in SEND[:size]]
    others = size - 1

    def all_to_all(xs):
        parts = [x.split(row) for x, row in zip(xs, send, strict=True)]
        return [torch.cat([parts[source][to] for source in range(size)]) for to in range(size)]

    def rows(place, forward):
        out = [send[place][to] if forward else send[to][place] for to in range(size) if to != place]
        return sum(out) * 3 * DOUBLE

    return {
        "all_gather": (
            lambda place: (2, 3, 5),
            lambda xs: [torch.cat(xs, 1)] * size,
            lambda place, forward: others * 30 * DOUBLE,
        ),
        "reduce_scatter": (
            lambda place: (2, 3 * size, 5),
            lambda xs: list(torch.stack(xs).sum(0).chunk(size, 1)),
            lambda place, forward: others * 30 * DOUBLE,
        ),
        "all_reduce": (
            lambda place: (3, 7),
            lambda xs: [torch.stack(xs).sum(0)] * size,
            lambda place, forward: 2 * others * 21 * DOUBLE // size,
        ),
        "all_to_all": (lambda place: (sum(send[place]), 3), all_to_all, rows),
        "swap": (
            lambda place: (2, 4),
            lambda xs: xs[::-1],
            lambda place, forward: 8 * DOUBLE,
        ),
        "stacked": (
            lambda place: (2, 3),
            lambda xs: [torch.stack(xs)] * size,
            lambda place, forward: others * 6 * DOUBLE,
        ),
    }


ENTRIES = {
    "all_gather": ("all_gather", "reduce_scatter"),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
    "stacked": ("all_gather", "reduce_scatter"),
}
"""What the ledger calls it and its gradient; the rest are their own, by their own name."""


@pytest.mark.parametrize(("size", "axis"), [(2, "tp"), (3, "sp"), (4, "sp"), (4, "dp_shard")])
def test_values_gradients_and_bytes(ranks, size, axis):
    found = ranks.run("messages", size, axis=axis)
    for kind, (shape, function, sent) in formulas(size).items():
        xs = [drawn(place, *shape(place)).requires_grad_() for place in range(size)]
        outs = function(xs)
        losses = [(out * drawn(100 + place, *out.shape)).sum() for place, out in enumerate(outs)]
        grads = torch.autograd.grad(torch.stack(losses).sum(), xs)
        names = ENTRIES.get(kind, (kind, kind))
        for place, rank in enumerate(found):
            if kind == "swap" and place == size - 1 - place:
                continue
            torch.testing.assert_close(rank[kind]["out"], outs[place].detach(), rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(rank[kind]["grad"], grads[place], rtol=1e-14, atol=1e-14)
            assert rank[kind]["axes"] == {axis}
            assert rank[kind]["sent"] == {
                (direction, entry): sent(place, direction == "forward")
                for direction, entry in zip(("forward", "backward"), names, strict=True)
            }, (kind, place)


@pytest.mark.parametrize("size", [2, 4])
def test_dims_that_do_not_divide_are_refused(ranks, size):
    with pytest.raises(
        AssertionError, match=rf"ValueError: {size} ranks of sp do not divide dim 0 of \(5, 2\)"
    ):
        ranks.run("uneven", size)
