"""A run on the cluster, and what can be seen of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from private_cluster import PrivateCluster

from plait.pretrain.run_folder import RunFolder
from plait.pretrain.standing import standing_of

__all__ = ["Submitted"]

PATIENCE = 180.0


class Submitted:
    def __init__(self, folder: Path, cluster: PrivateCluster) -> None:
        self.folder, self.cluster = folder, cluster

    @property
    def job(self) -> int:
        last = (self.folder / "launch" / "jobs.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["jobs"][0]

    def ask(self, form: str) -> str:
        return self.cluster.ask("squeue", "-h", "-j", str(self.job), "-t", "all", "-o", form).strip()

    @property
    def state(self) -> str:
        return self.ask("%T")

    @property
    def step(self) -> int:
        """The last that it has done."""
        return standing_of(RunFolder(self.folder)).step or 0

    @property
    def log(self) -> str:
        file = self.folder / "logs" / f"slurm-{self.job}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{self.ask('%T %r %N')}\n{self.log}"
            time.sleep(0.1)

    def wait_for_steps(self, more: int) -> None:
        goal = self.step + more
        self.wait(lambda: self.step >= goal)

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
