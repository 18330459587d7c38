"""Slurm's own commands, and what they say."""

import subprocess
from dataclasses import dataclass

from ...errors import UserError

__all__ = ["Job", "cancel", "jobs_in_queue", "submit"]

FIELDS = "%i|%T|%r|%M|%L|%D|%N|%S"
"""Of squeue: number, state, reason, time used, time left, nodes, their names, expected start."""


@dataclass(frozen=True)
class Job:
    """A job in the queue."""

    number: int
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, …"""
    reason: str
    """Why it waits; None is Slurm's word for no reason."""
    used: str
    left: str
    nodes: int
    names: str
    """Of its nodes, in Slurm's short form."""
    start: str
    """When it began or is expected to; N/A where that is not known."""


def submit(script: str, options: list[str]) -> int:
    """Put a script into the queue; returns the job's number.

    Args:
        options: of sbatch, over those in the script.

    Raises:
        UserError: Slurm refuses it, or is not here.
    """
    out = _slurm("sbatch", "--parsable", *options, script)
    return int(out.strip().split(";")[0])


def jobs_in_queue(numbers: list[int]) -> list[Job]:
    """Those of the jobs that have not ended, by number.

    Raises:
        UserError: Slurm does not answer, or is not here.
    """
    if not numbers:
        return []
    # A number that Slurm has forgotten would fail the whole question, so all of this user's are asked for.
    out = _slurm("squeue", "--noheader", "--me", "--states=all", f"--format={FIELDS}")
    jobs = [_job(line) for line in out.splitlines() if line.count("|") >= 7]
    ended = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}
    return sorted((j for j in jobs if j.number in numbers and j.state not in ended), key=lambda j: j.number)


def cancel(numbers: list[int]) -> None:
    """End jobs at once.

    Raises:
        UserError: Slurm refuses, or is not here.
    """
    if numbers:
        _slurm("scancel", *map(str, numbers))


def _job(line: str) -> Job:
    number, state, reason, used, left, nodes, names, start = line.split("|")[:8]
    return Job(int(number.partition("_")[0]), state, reason, used, left, int(nodes), names, start)


def _slurm(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: no such command here; do this on a machine of a Slurm cluster, or look at the "
            "script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer from Slurm in 60 s; look at `sinfo`") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{said[:500] or f'{words[0]} failed with status {done.returncode}'}")
    return done.stdout
