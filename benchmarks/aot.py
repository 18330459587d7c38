"""Every kernel at production shapes, compiled for every architecture without one: what each takes.

    python benchmarks/aot.py [--arch sm_90 …] [--operator ssd …] [--processes 2] [--write]

With --write, the tables go to benchmarks/results/aot/. Nothing here is a time: registers, spilled bytes,
shared memory and occupancy are the compiler's.
"""

import argparse
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from plait.kernels.ahead import compile_all
from plait.kernels.compiling import SHAPES, TARGETS, Compilation, Shape, Usage
from plait.kernels.launches import OPERATORS, launches

RESULTS = Path(__file__).parent / "results" / "aot"
GRID = (2**31 - 1, 65535, 65535)
"""The most programs along each of the grid's dims."""


@dataclass
class Entry:
    """A binary for an architecture."""

    arch: str
    compilation: Compilation
    shapes: list[str]
    usage: Usage | None = None
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        if self.usage is None:
            return [self.error]
        usage, found = self.usage, []
        if not usage.fits:
            found.append("no block fits into a multiprocessor")
        if usage.atomics:
            found.append(f"atomics {', '.join(usage.atomics)}")
        if any(size > most for size, most in zip(self.compilation.grid, GRID, strict=False)):
            found.append(f"grid {self.compilation.grid}")
        return found

    @property
    def record(self) -> dict[str, Any]:
        compilation = self.compilation
        constants = {name: value for name, value in compilation.constants.items() if value is not None}
        return {
            "kernel": compilation.name,
            "constants": constants,
            "signature": dict(compilation.signature),
            "num_warps": compilation.num_warps,
            "num_stages": compilation.num_stages,
            "grid": compilation.grid,
            "shapes": self.shapes,
            "usage": asdict(self.usage) if self.usage else None,
            "faults": self.faults,
        }


def entries(
    archs: Sequence[str], operators: tuple[str, ...] | None = None, shapes: Sequence[Shape] = SHAPES
) -> list[Entry]:
    """What there is to compile, each binary once; its grid is that of the first shape that takes it."""
    found: dict[tuple, Entry] = {}
    for arch in archs:
        for shape in shapes:
            for launch in launches(shape, arch, operators):
                entry = found.setdefault((arch, launch.binary), Entry(arch, launch, []))
                entry.shapes.append(shape.label)
    return list(found.values())


def measured(todo: Sequence[Entry], processes: int) -> Iterator[Entry]:
    for compiled in compile_all([(entry.compilation, entry.arch) for entry in todo], processes):
        entry = todo[compiled.place]
        entry.usage, entry.error = compiled.usage, compiled.error
        yield entry


def table(found: Sequence[Entry], num_shapes: int) -> Iterator[str]:
    """Markdown, a row a binary."""
    variants = defaultdict(list)
    for entry in found:
        variants[entry.compilation.name].append(entry)
    yield (
        "| kernel | where variants differ | shapes | warps | stages | registers | spilled bytes | "
        "shared KB | occupancy | atomics | 32-bit offsets | faults |"
    )
    yield "|---" * 12 + "|"
    for name in sorted(variants):
        for entry in variants[name]:
            usage, compilation = entry.usage, entry.compilation
            shapes = "all" if len(set(entry.shapes)) == num_shapes else str(len(set(entry.shapes)))
            cells = [
                name,
                _differences(compilation, [other.compilation for other in variants[name]]),
                shapes,
                str(compilation.num_warps),
                str(compilation.num_stages),
                *(
                    ["-"] * 6
                    if usage is None
                    else [
                        str(usage.registers),
                        str(usage.stack),
                        f"{usage.shared / 1024:.1f}",
                        f"{usage.occupancy:.0%}",
                        ", ".join(usage.atomics) or "none",
                        ", ".join(usage.narrow) or "none",
                    ]
                ),
                "; ".join(entry.faults),
            ]
            yield f"| {' | '.join(cells)} |"


def _differences(one: Compilation, others: Sequence[Compilation]) -> str:
    """The constants, and the numbers that 16 divides, in which a binary is not like its kernel's others."""
    shown = []
    for name, kind in one.signature.items():
        values = {repr(other.constants.get(name, other.signature[name])) for other in others}
        if len(values) > 1 or len({name in other.aligned for other in others}) > 1:
            known = " of 16" if name in one.aligned and kind != "constexpr" else ""
            shown.append(f"{name} {one.constants.get(name, kind)}{known}")
    return ", ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--operator", nargs="+", choices=tuple(OPERATORS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()

    import triton

    where = f"triton {triton.__version__}, {platform.machine()}, {os.cpu_count()} cores; {date.today()}"
    print(where, flush=True)
    faults = total = 0
    for arch in args.arch:
        found = entries([arch], tuple(args.operator) if args.operator else None)
        total += len(found)
        for entry in measured(found, args.processes):
            if entry.faults:
                faults += 1
                print(f"{arch} {entry.compilation.name}: {'; '.join(entry.faults)}", flush=True)
        _show(arch, found, where, write=args.write)
    if faults:
        raise SystemExit(f"{faults} of {total} binaries are not as they must be")


def _show(arch: str, found: Sequence[Entry], where: str, *, write: bool) -> None:
    lines = list(table(found, len(SHAPES)))
    if not write:
        print(f"\n{arch}\n\n" + "\n".join(lines), flush=True)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    head = [f"# {arch}", "", f"`python benchmarks/aot.py --write`; {where}", ""]
    (RESULTS / f"{arch}.md").write_text("\n".join([*head, *lines]) + "\n")
    records = "[\n" + ",\n".join(json.dumps(entry.record) for entry in found) + "\n]\n"
    (RESULTS / f"{arch}.json").write_text(records)
    print(f"{arch}: {len(found)} binaries", flush=True)


if __name__ == "__main__":
    main()
