"""A step's limit: what sets one, what it is, and when there is none."""

from plait.parallel.pace import FEWEST, RECENT, Pace


def pace_after(seconds: list[float], factor: float | None = 20.0, least: float = 60.0) -> Pace:
    pace = Pace(factor, least)
    for one in seconds:
        pace.took(one)
    return pace


def test_the_first_steps_have_no_limit_nor_those_after_a_change():
    pace = pace_after([3.0] * (FEWEST - 1))
    assert pace.limit() is None
    pace.took(3.0)
    assert pace.limit() is not None
    pace.forget()
    assert pace.limit() is None


def test_a_multiple_of_the_median_of_recent_steps():
    limit = pace_after([100.0] * 10 + [3.0] * 11 + [500.0] * (RECENT - 11)).limit()
    assert limit is not None
    assert (limit.seconds, limit.words) == (60.0, "60 s, 20 times the median step of 3 s")
    limit = pace_after([90.0] * RECENT, factor=15).limit()
    assert limit is not None
    assert limit.words == "1350 s, 15 times the median step of 90 s"


def test_short_steps_have_the_least():
    limit = pace_after([0.25] * RECENT).limit()
    assert limit is not None
    assert limit.seconds == 60.0
    assert limit.words == ("60 s in a step, which is parallel.timeout_least; the median step takes 0.25 s")


def test_without_a_factor_there_is_none():
    assert pace_after([3.0] * RECENT, factor=None).limit() is None
