"""Training steps of the demo's model on this rank: seconds, loss, and the peak of its resident set."""

import gc
import time
from pathlib import Path
from typing import Any

import torch

from plait.parallel.placements import local
from plait.pretrain.config_file import load_config
from plait.pretrain.trainer import Trainer

__all__ = ["job"]


def job(rank: int, ranks: int, *, config: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Run steps on a fresh run; memory is that of the last.

    Returns:
        steps: each one's seconds and loss.
        parameters, optimizer: bytes that stand between steps on this rank.
        peak: bytes that the last step had above what stood before it, at the most.
    """
    trainer = Trainer(load_config(config, overrides))
    records = []
    before = peak = 0
    with trainer._loader() as loader:
        for _ in range(steps):
            batch, _ = loader.next()
            gc.collect()
            before = _status("VmRSS")
            # The peak is the kernel's, from here on.
            Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            metrics = trainer.train_step(batch)
            records.append({"seconds": time.perf_counter() - start, "loss": metrics["loss"]})
            peak = _status("VmHWM") - before
    model, optimizer = trainer.state.model, trainer.state.optimizer
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "steps": records,
        "parameters": sum(local(p).nbytes for p in model.parameters()),
        "optimizer": sum(local(s).nbytes for s in states if isinstance(s, torch.Tensor)),
        "standing": before,
        "peak": peak,
    }


def _status(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024
