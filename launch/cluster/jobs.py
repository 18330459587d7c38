"""Which jobs a run has had: `RUN/launch/jobs.jsonl`, a line a submission."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["JOBS_FILE", "Submission", "read_submissions", "record_submission"]

JOBS_FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Submission:
    jobs: list[int]
    """Numbers; more than one in a chain."""
    nodes: int
    gpus_per_node: int
    time: float
    """In seconds since 1970."""


def record_submission(folder: Path, jobs: list[int], nodes: int, gpus_per_node: int) -> None:
    """Add a line; `folder` is the run's launch folder."""
    line = json.dumps(asdict(Submission(jobs, nodes, gpus_per_node, time.time())))
    with (folder / JOBS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_submissions(folder: Path) -> list[Submission]:
    """All there were, the newest last; lines that are none are passed over."""
    try:
        lines = (folder / JOBS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
            found.append(Submission(**record))
        except (ValueError, TypeError):
            continue
    return found
