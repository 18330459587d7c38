"""A process a section: what one breaks, exhausts or hangs on does not touch the next."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SECTIONS", "Section", "run_all"]

TAIL = 6000
"""Characters of a failed section's last words that are kept."""


@dataclass(frozen=True)
class Section:
    name: str
    module: str
    """Has `run(setting, results)`."""
    seconds: float
    """After which it is ended; what it has written stays."""


SECTIONS = (
    Section("machine", "gpu.machine", 30),
    Section("correctness", "gpu.correctness", 90),
    Section("determinism", "gpu.determinism", 45),
    Section("roofline", "gpu.roofline", 20),
    Section("kernels", "gpu.kernels", 80),
    Section("scan", "gpu.scan", 120),
    Section("step", "gpu.step", 90),
)
"""Together 475 seconds at the most."""


def run_all(
    sections: tuple[Section, ...],
    out: Path,
    arguments: list[str],
    *,
    patience: float = 1.0,
    done: Callable[[dict[str, Any]], None] = lambda results: None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the sections one after another; results.json is whole after each.

    Args:
        arguments: handed to every section's process.
        patience: multiplies every budget.
        done: called after each section with all results so far.

    Returns:
        Section -> {"state": "done" | "failed" | "out of time", "seconds", "error", "results"}.
    """
    out.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {}
    for section in sections:
        everything[section.name] = _run(section, out, arguments, patience, environment or {})
        (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
        done(everything)
    return everything


def _run(
    section: Section, out: Path, arguments: list[str], patience: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    found = out / f"{section.name}.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu.section", section.module, str(found), *arguments]
    begin = time.perf_counter()
    log = out / f"{section.name}.log"
    # A file, not a pipe: a process that a compiler left behind would keep a pipe open.
    with open(log, "wb") as words:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(section.seconds * patience) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            # The section and whatever it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = json.loads(found.read_text()) if found.exists() else {}
    found.unlink(missing_ok=True)
    return {
        "state": state,
        "seconds": round(time.perf_counter() - begin, 1),
        "error": "" if state == "done" else log.read_text(errors="replace")[-TAIL:],
        "results": results,
    }
