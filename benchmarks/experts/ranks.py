"""Many gloo ranks on this machine, each a process with one thread, that do the same job."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

__all__ = ["on_ranks"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed tensors go back to the kernel, so that the resident set is what is alive; it costs time."""


def on_ranks(ranks: int, job: Callable[..., Any], *, freed_at_once: bool = False, **options: Any) -> Any:
    """What the job returned on each rank, called as ``job(rank, ranks, **options)``.

    Raises:
        ProcessRaisedException: a rank failed.
    """
    added = ENVIRONMENT | (FREED_AT_ONCE if freed_at_once else {})
    with TemporaryDirectory(prefix="plait-benchmark-") as name, _environment(added):
        spawn(_rank, (ranks, name, job, options), nprocs=ranks)
        return [json.loads((Path(name) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= added
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _rank(rank: int, ranks: int, folder: str, job: Callable[..., Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = job(rank, ranks, **options)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    # Threads of gloo that are still there at the interpreter's exit abort it at times.
    os._exit(0)
