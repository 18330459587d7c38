"""Ranks as threads of one process, for kernels that meet others only through a callable; sizes of tensors."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class _LargestTensor(TorchDispatchMode):
    def __init__(self, apart: int) -> None:
        super().__init__()
        self.apart, self.elements = apart, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(size for size in sizes if size != self.apart)])
        return out


@pytest.fixture
def largest_tensor() -> Callable[..., _LargestTensor]:
    """``with largest_tensor(apart=n) as seen``: ``seen.elements`` becomes the most that any operator gave
    out, tensors of n elements apart."""
    return _LargestTensor
