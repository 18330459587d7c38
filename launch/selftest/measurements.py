"""How fast a device multiplies matrices and copies memory, and how a disk takes a file.

A device is measured in bursts that take turns, and its figure is that of the best. A burst is longer than the
slices of time in which a scheduler shares a core, or a quota stops a process, so that what has half of the
time is half as fast in every burst; what another process takes for a moment spoils only some of them. Where
no burst had a processor to itself, more are tried.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .report import Disk

if TYPE_CHECKING:
    import torch

__all__ = ["BURSTS", "Burst", "Speeds", "bursts", "measure_disk", "speeds"]

BURSTS = 7

MOST_BURSTS = 14
"""Of a processor that others use too."""

UNDISTURBED = 0.9
"""Share of its time with which a burst had the processor to itself."""

BURST_SECONDS = 0.3

WRITTEN = 1 << 20
"""Bytes of the file that tries the disk."""


@dataclass(frozen=True)
class Burst:
    rate: float
    """Per second."""
    share: float
    """Processor time over elapsed time and threads."""


@dataclass(frozen=True)
class Speeds:
    matmul: float
    """TFLOP/s."""
    memory: float
    """GB/s."""
    share: float


def speeds(device: "torch.device", say: Callable[[str], None], start: Callable[[], None]) -> Speeds:
    """Measure a device.

    Args:
        say: is told what is tried, before it is.
        start: waits until the node's other devices are ready too.
    """
    import torch

    gpu = device.type == "cuda"
    # Beyond every cache, also where a processor's is shared by few ranks.
    size, copied = (8192, 1 << 30) if gpu else (1024, 1 << 27)
    dtype = torch.bfloat16 if gpu else torch.float32
    say("matmul")
    a_MM = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    b_MM = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    out_MM = torch.mm(a_MM, b_MM)
    # A device that computes nonsense is as broken as one that does not compute.
    if not bool(out_MM.isfinite().all()):
        raise ArithmeticError("a product of finite matrices is not finite")
    say("memory")
    source, target = (torch.ones(copied, device=device, dtype=torch.uint8) for _ in range(2))
    target.copy_(source)

    def settle() -> None:
        if gpu:
            torch.cuda.synchronize(device)

    settle()
    start()
    say("bursts")
    threads = torch.get_num_threads()
    products = bursts(lambda: torch.mm(a_MM, b_MM, out=out_MM), 2 * size**3, settle, threads)
    copies = bursts(lambda: target.copy_(source), 2 * copied, settle, threads)
    done: list[tuple[Burst, Burst]] = []
    while len(done) < (BURSTS if gpu or _undisturbed(done) else MOST_BURSTS):
        done.append((next(products), next(copies)))
    product, copy = (max(kind, key=lambda burst: burst.rate) for kind in zip(*done, strict=True))
    return Speeds(matmul=product.rate / 1e12, memory=copy.rate / 1e9, share=product.share)


def _undisturbed(done: list[tuple[Burst, Burst]]) -> bool:
    """Whether each kind of burst once had the processor to itself."""
    return bool(done) and all(max(b.share for b in kind) > UNDISTURBED for kind in zip(*done, strict=True))


def bursts(
    deed: Callable[[], object], work: float, settle: Callable[[], None], threads: int
) -> Iterator[Burst]:
    """Bursts of a deed, one whenever the next is asked for.

    Args:
        work: what one deed does, in any unit.
        settle: waits until the device has done what it was told.
        threads: that a deed keeps busy.
    """
    while True:
        began, busy, done = time.perf_counter(), time.process_time(), 0
        while (elapsed := time.perf_counter() - began) < BURST_SECONDS:
            deed()
            settle()
            done += 1
        yield Burst(work * done / elapsed, (time.process_time() - busy) / (elapsed * threads))


def measure_disk(folder: Path, node: str) -> Disk:
    """Room in a folder, and how long a small file takes; the file does not stay."""
    file = folder / f".self-test-{node}-{os.getpid()}"
    try:
        free = shutil.disk_usage(folder).free
        began = time.perf_counter()
        try:
            with file.open("wb") as stream:
                stream.write(bytes(WRITTEN))
                stream.flush()
                os.fsync(stream.fileno())
            return Disk(free, time.perf_counter() - began)
        except OSError as error:
            return Disk(free, failed=error.strerror or str(error))
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        return Disk(failed=error.strerror or str(error))
