"""Timing that holds on a noisy machine: candidates take turns, and ratios are taken turn by turn."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["Times", "machine", "take_turns"]


@dataclass(frozen=True)
class Times:
    """Seconds of each turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times_faster_than(self, rival: "Times") -> float:
        """The median over turns of the rival's time divided by this one's."""
        return statistics.median(b / a for a, b in zip(self.seconds, rival.seconds, strict=True))


def take_turns(
    candidates: Mapping[str, Callable[[], object]], turns: int, warmup: int = 1
) -> dict[str, Times]:
    """Run every candidate once a turn, in order, and time each."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + turns):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(values) for name, values in seconds.items()}


def machine(*packages: str) -> str:
    """One line that says where and when, and the versions that matter."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        models = (
            [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
        )
        name = models[0].split(":", 1)[1].strip() if models else platform.processor()
        name = f"{name}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    return f"{name}; {date.today()}; Python {platform.python_version()}, {versions}"
