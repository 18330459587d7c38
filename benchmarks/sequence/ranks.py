"""Many gloo ranks on this machine, each a process with one thread, that do the same jobs.

    python -m sequence.ranks FOLDER RANK RANKS

FOLDER/jobs.json lists them, each a name and its options; FOLDER/rank-RANK.json gets what they return.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["on_ranks"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed tensors go back to the kernel, so that the resident set is what is alive; it costs time."""

Job = tuple[str, dict[str, Any]]


def on_ranks(ranks: int, jobs: Sequence[Job], *, freed_at_once: bool = False) -> list[list[Any]]:
    """For each job what each rank's returned.

    Raises:
        RuntimeError: a rank failed.
    """
    environment = os.environ | ENVIRONMENT | (FREED_AT_ONCE if freed_at_once else {})
    with TemporaryDirectory(prefix="plait-benchmark-") as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "sequence.ranks", str(folder), str(rank), str(ranks)],
                cwd=Path(__file__).parent.parent,
                env=environment,
            )
            for rank in range(ranks)
        ]
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    # The others wait for it in vain; time for it to have said why.
                    time.sleep(1)
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime)
        if errors or any(process.returncode for process in processes):
            why = errors[0].read_text() if errors else f"{[process.returncode for process in processes]}"
            raise RuntimeError(f"{ranks} ranks: {why}")
        by_rank = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        return [list(results) for results in zip(*by_rank, strict=True)]


def main(folder: Path, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    from . import fold, layer, training

    jobs = {
        "exact": layer.exact_job,
        "layer": layer.job,
        "recompute": layer.recompute_job,
        "fold": fold.job,
        "training": training.job,
    }
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        listed = json.loads((folder / "jobs.json").read_text())
        results = [jobs[name](rank, ranks, **options) for name, options in listed]
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
