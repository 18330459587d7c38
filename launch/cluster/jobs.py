"""What a launcher keeps in a run's folder, and which jobs the run has had: `RUN/launch/jobs.jsonl`, a line a
submission. Without torch: jobs and their owners ask here often."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["FROZEN_CONFIG", "Submission", "launch_folder", "numbers_of", "record_submission"]

JOBS_FILE = "jobs.jsonl"

FROZEN_CONFIG = "config.yaml"
"""What the ranks read."""


def launch_folder(run: Path) -> Path:
    """What a launcher keeps in a run's folder."""
    return run / "launch"


@dataclass(frozen=True)
class Submission:
    jobs: list[int]
    """Numbers; more than one in a chain."""
    nodes: int
    gpus_per_node: int
    time: float
    """In seconds since 1970."""


def record_submission(run: Path, jobs: list[int], nodes: int, gpus_per_node: int) -> None:
    """Add a line."""
    line = json.dumps(asdict(Submission(jobs, nodes, gpus_per_node, time.time())))
    with (launch_folder(run) / JOBS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def numbers_of(run: Path) -> list[int]:
    """All jobs that the run has had, the newest last; lines that are none are passed over."""
    try:
        lines = (launch_folder(run) / JOBS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            found += Submission(**json.loads(line)).jobs
        except (ValueError, TypeError):
            continue
    return found
