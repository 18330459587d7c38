"""A call's time on a device."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["measure"]


def measure(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> dict[str, float]:
    """Milliseconds of single calls by the device's own clock, as many as the time allows, at least 3."""
    call()
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return {"ms": (time.perf_counter() - begin) * 1e3, "least": 0.0, "most": 0.0, "calls": 1}
    torch.cuda.synchronize(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": statistics.median(times), "least": min(times), "most": max(times), "calls": len(times)}
