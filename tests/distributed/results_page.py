"""A page of benchmarks/results that a long test writes: what it found, on which machine and day."""

import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

__all__ = ["section", "write_page"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def write_page(name: str, title: str, introduction: str, lines: Iterable[str]) -> None:
    """Write NAME-MACHINE.md.

    Args:
        introduction: what the numbers are.
        lines: all below it.
    """
    model, slug = _processor()
    page = [
        f"# {title}",
        "",
        f"Written by `make test-long`. {time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, gloo, Python {platform.python_version()}.",
        "",
        introduction,
        *lines,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{slug}.md").write_text("\n".join(page) + "\n")


def section(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A section with one table, whose first column names the rows."""
    lines = [_row(columns), "|---" * len(columns) + "|", *map(_row, rows)]
    return ["", f"## {heading}", "", *lines]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _processor() -> tuple[str, str]:
    """Its name, and the name as part of a file's."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return model, re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
