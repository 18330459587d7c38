"""From logits to an id: shares, nucleus, temperature, and wrong numbers."""

import math

import pytest
import torch

from plait.errors import UserError
from plait.pretrain.generation import Sampling
from plait.pretrain.generation.sampling import Sampler, choose

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


def shares(sampling: Sampling, draws: int = 1000) -> list[float]:
    """How much of [0, 1) chooses each id."""
    draw = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    ids = choose(LOGITS.expand(draws, -1), draw, sampling)
    return (torch.bincount(ids, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(top_p=0.5), [0, 1, 0, 0]),
        (Sampling(top_p=0.51), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(top_p=0.9), [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [p * p / 0.345 for p in (0.1, 0.5, 0.15, 0.25)]),
        (Sampling(temperature=1e-6), [0, 1, 0, 0]),
    ],
)
def test_ids_get_their_shares(sampling, expected):
    assert shares(sampling) == pytest.approx(expected, abs=2e-3)


def test_the_ends_of_the_draw_choose_an_id_of_the_nucleus():
    draw = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    ids = choose(LOGITS.expand(2, -1), draw, Sampling(top_p=0.9))
    assert ids.tolist() == [1, 2]


def test_temperature_zero_is_the_likeliest():
    sampler = Sampler(Sampling(temperature=0.0), [[1], [2]])
    assert sampler(torch.stack([LOGITS, -LOGITS])).tolist() == [1, 0]


def test_a_sampler_repeats_itself():
    logits = torch.zeros(2, 1000)
    first, second = (Sampler(Sampling(seed=8), [[1], [2]]) for _ in range(2))
    drawn = [first(logits).tolist() for _ in range(5)]
    assert drawn == [second(logits).tolist() for _ in range(5)]
    assert len({token for row in drawn for token in row}) > 5


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: give 0, which is greedy, or more"),
        ({"temperature": math.nan}, "temperature = nan: give 0, which is greedy, or more"),
        ({"top_p": 0.0}, "top_p = 0.0: give more than 0, and 1 at most"),
        ({"top_p": 1.1}, "top_p = 1.1: give more than 0, and 1 at most"),
    ],
)
def test_wrong_numbers(wrong, line):
    with pytest.raises(UserError) as error:
        Sampling(**wrong)
    assert str(error.value) == line
