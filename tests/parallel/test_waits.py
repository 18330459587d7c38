"""What is waited for on a GPU, by events that stand in for its own; test_stragglers.py has the clock."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from plait.parallel.waits import StreamWaits, Waits, waits_on


class Event:
    """Recorded every 5 ms."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.at = 5.0 * Event.recorded

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


def test_a_stream_counts_between_pairs_of_events_and_only_when_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.Event", Event)
    waits = waits_on(torch.device("cuda"))
    assert isinstance(waits, StreamWaits)
    waits.begin(measured=False)
    with waits:
        pass
    assert (waits.seconds(), Event.recorded) == (None, 0)
    waits.begin()
    assert waits.seconds() == 0.0
    for _ in range(3):
        with waits:
            pass
    # What the host calls runs on another stream.
    waits.during(lambda: None)
    waits.since(0.0)
    assert waits.seconds() == pytest.approx(0.015)
    waits.begin()
    assert waits.seconds() == 0.0


def test_the_clock_elsewhere():
    assert type(waits_on(torch.device("cpu"))) is Waits


def test_fsdp_has_the_waits_that_are_counted():
    assert callable(FSDPParamGroup.wait_for_unshard)
    assert callable(FSDPParamGroup.finalize_backward)
