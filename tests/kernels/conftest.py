"""Ranks as threads of one process, for kernels that meet others only through a callable."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor


def _run_ranks(num_ranks: int, of_rank: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    barrier = threading.Barrier(num_ranks, timeout=30)
    given: list[Tensor] = [torch.zeros(0)] * num_ranks

    def work(rank: int) -> Any:
        calls = 0

        def gather(tensor: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            given[rank] = tensor.detach().clone()
            barrier.wait()
            gathered = torch.stack(given)
            barrier.wait()
            return gathered

        try:
            result = of_rank(rank, gather)
            counts = gather(torch.tensor(calls))
            assert (counts == counts[0]).all(), f"calls of gather by rank: {counts.tolist()}"
            return result
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(work, rank) for rank in range(num_ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # A rank that only waited for the one that failed says less.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """``run_ranks(R, of_rank)``: what each rank's ``of_rank(rank, gather)`` returns.

    ``gather`` stacks the ranks' tensors in order. All must call it equally often and with equal shapes;
    one that does not, or fails, fails them all.
    """
    return _run_ranks
