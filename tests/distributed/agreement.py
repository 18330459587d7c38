"""What it means that ranks and one rank agree."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = [
    "HELD",
    "Parts",
    "assert_same_gradients",
    "assert_same_steps",
    "differences",
    "distance",
    "whole_tensors",
]

Parts = Mapping[str, tuple[tuple[slice, ...], Tensor]]
"""What a rank holds: name -> where it lies in the whole, and its values."""

HELD = ("loss", "grad_norm", "validation_loss")
"""Metrics that are held to a bound in every dtype."""

NOT_COMPARED = ("step", "tokens", "lr")
"""Metrics that come of no computation."""


def assert_same_steps(ranks: list[list[dict[str, Any]]], one: list[dict[str, Any]], tolerance: float) -> None:
    """Every metric of every step, on every rank, within a relative tolerance of one rank's."""
    for records in ranks:
        worst = differences(records, one)
        assert set(HELD) <= worst.keys()
        far = {name: difference for name, difference in worst.items() if not difference <= tolerance}
        assert not far, far
        assert [{k: r[k] for k in NOT_COMPARED} for r in records] == [
            {k: r[k] for k in NOT_COMPARED} for r in one
        ]


def differences(records: list[dict[str, Any]], one: list[dict[str, Any]]) -> dict[str, float]:
    """Metric -> its largest relative difference over the steps."""
    worst: dict[str, float] = {}
    for record, wanted in zip(records, one, strict=True):
        assert record.keys() == wanted.keys()
        for name in wanted.keys() - set(NOT_COMPARED):
            value, right = (torch.tensor(r[name], dtype=torch.float64) for r in (record, wanted))
            apart = ((value - right).abs() / right.abs().clamp(min=1e-30)).max()
            worst[name] = max(worst.get(name, 0.0), float(apart))
    return worst


def assert_same_gradients(ranks: list[dict[str, Any]], one: dict[str, Any], tolerance: float) -> None:
    """Loss, norm, and every parameter's gradient, within a tolerance relative to its largest element.

    A gradient that cancels to nothing, as a query's that sees one key, is rounding in any layout: below one
    rounding of the whole gradient nothing is compared.
    """
    nothing = torch.finfo(torch.float64).eps * one["norm"]
    for name, (_, whole) in one["gradients"].items():
        covered = torch.zeros(whole.shape, dtype=torch.bool)
        scale = float(whole.abs().max())
        for found in ranks:
            where, values = found["gradients"][name]
            covered[where] = True
            assert _largest(values - whole[where]) <= max(tolerance * scale, nothing), name
        assert covered.all(), f"{name}: no rank holds some of it"
    for found in ranks:
        assert found["gradients"].keys() == one["gradients"].keys()
        assert found["targets"] == one["targets"]
        assert [found["loss"], found["norm"]] == pytest.approx([one["loss"], one["norm"]], rel=tolerance)


def whole_tensors(ranks: Sequence[Parts]) -> dict[str, Tensor]:
    """Tensors put together from what all ranks hold; where several hold the same, it has the same bits."""
    whole: dict[str, Tensor] = {}
    for name in ranks[0]:
        shape = [max(held[name][0][dim].stop for held in ranks) for dim in range(len(ranks[0][name][0]))]
        covered = torch.zeros(shape, dtype=torch.bool)
        tensor = whole[name] = torch.zeros(shape, dtype=ranks[0][name][1].dtype)
        for held in ranks:
            where, values = held[name]
            again = covered[where]
            assert torch.equal(tensor[where][again], values[again]), f"{name}: two ranks differ"
            tensor[where] = values
            covered[where] = True
        assert covered.all(), f"{name}: no rank holds some of it"
    assert all(held.keys() == whole.keys() for held in ranks)
    return whole


def distance(tensor: Tensor, one: Tensor) -> float:
    """The norm of the difference over the norm of `one`, as `plait checkpoint diff` reckons it."""
    far, size = (float(t.to(torch.float64).norm()) for t in (tensor.to(torch.float64) - one, one))
    return far / size if size else far


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
