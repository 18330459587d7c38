"""Saving a checkpoint, measured: how long training stands still, how long until it is on the disk.

    python benchmarks/checkpoint.py [--megabytes 400] [--turns 9] [--folder FOLDER] [--out benchmarks/results]

One process with one thread saves weights and both moments of AdamW, fp32. A turn is each form once: the same
bytes written and synced by themselves, torch.save with a sync behind it, plait waiting for the disk, and
plait beside the training. Each replaces what it saved the turn before. plait hashes what it writes and
reads it back from the disk; the others do neither. The tables go to OUT/checkpoint-MACHINE.md, the turns to
.json beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from table_rows import heading, line, median_ratio
from timing import machine
from torch import Tensor

from plait.pretrain.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parent.parent
PIECE = 4 << 20
FORMS = {
    "raw": "the bytes, written and synced",
    "torch": "torch.save, synced",
    "sync": "plait",
    "async": "plait, async",
}


def state(megabytes: int) -> dict[str, Tensor]:
    """Weights and moments of layers of 1024, as a training names them."""
    layers = max(1, megabytes * 10**6 // (3 * 4 * 12 * 1024**2))
    shapes = {"up_proj": (4096, 1024), "down_proj": (1024, 4096), "in_proj": (3072, 1024), "norm": (1024,)}
    shapes["out_proj"] = (1024, 1024)
    names = [(f"layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in shapes.items()]
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {f"{kind}.{name}": torch.randn(shape) for kind in kinds for name, shape in names}


class Forms:
    """What each form writes in a turn; returns seconds until training may go on, and until all is written."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self._folder, self._tensors, self._step = folder, dict(tensors), 0
        self._sync = Checkpoints(folder / "sync", keep=1)
        self._async = Checkpoints(folder / "async", keep=1, background=True)
        self._sync.save(0, tensors, {})
        (checkpoint,) = self._sync.all()
        self.size = checkpoint.size
        self._bytes = b"".join(file.read_bytes() for file in sorted(checkpoint.path.iterdir()))

    def prepare(self) -> None:
        """As a training does at its start, with steps before the first save."""
        self._async.prepare(self._tensors)
        time.sleep(5)

    def turn(self, form: str) -> tuple[float, float]:
        self._step += 1
        began = time.perf_counter()
        blocked = {"raw": self._raw, "torch": self._torch, "sync": self._ours, "async": self._ours_beside}[
            form
        ]()
        ended = time.perf_counter()
        return (blocked or ended) - began, ended - began

    def _raw(self) -> None:
        def write(path: Path) -> None:
            with open(path, "wb", buffering=0) as file:
                view = memoryview(self._bytes)
                for start in range(0, len(view), PIECE):
                    file.write(view[start : start + PIECE])
                os.fsync(file.fileno())

        self._replace("raw", write)

    def _torch(self) -> None:
        def write(path: Path) -> None:
            with open(path, "wb") as file:
                torch.save(self._tensors, file)
                file.flush()
                os.fsync(file.fileno())

        self._replace("torch", write)

    def _replace(self, name: str, write: Callable[[Path], None]) -> None:
        write(self._folder / f"{name}.new")
        os.replace(self._folder / f"{name}.new", self._folder / name)

    def _ours(self) -> None:
        self._sync.save(self._step, self._tensors, {})

    def _ours_beside(self) -> float:
        self._async.save(self._step, self._tensors, {})
        blocked = time.perf_counter()
        self._async.wait()
        return blocked


def measure(folder: Path, megabytes: int, turns: int) -> dict[str, object]:
    forms = Forms(folder, state(megabytes))
    forms.prepare()
    first = forms.turn("async")
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
        for form in FORMS:
            os.sync()
            found[form].append(forms.turn(form))
    return {"size": forms.size, "first": first, "turns": found}


def table(result: dict[str, object]) -> str:
    size, turns, first = result["size"], result["turns"], result["first"]
    assert isinstance(size, int)
    assert isinstance(turns, dict)
    assert isinstance(first, tuple | list)
    rows = [
        "# Saving a checkpoint",
        "",
        f"{result['where']}",
        "",
        f"{size / 1e6:.0f} MB, medians of {len(turns['raw'])} turns; ratios are medians over turns.",
        "",
        *heading(
            "form", "blocked s", "total s", "MB/s", "total, of the bytes alone", "blocked, of its total"
        ),
    ]
    raw = [total for _, total in turns["raw"]]
    for form, name in FORMS.items():
        blocked, total = ([turn[i] for turn in turns[form]] for i in (0, 1))
        middle = statistics.median(total)
        share = f"{median_ratio(blocked, total):.1%}" if form == "async" else "all"
        rows.append(
            line(
                name,
                f"{statistics.median(blocked):.3f}",
                f"{middle:.2f}",
                f"{size / 1e6 / middle:.0f}",
                f"{median_ratio(total, raw):.2f}x",
                share,
            )
        )
    sync = [total for _, total in turns["sync"]]
    blocked = [turn[0] for turn in turns["async"]]
    rows += [
        "",
        f"Training stands still for {median_ratio(blocked, sync):.1%} of the time that a save which waits "
        f"takes, and for {median_ratio(blocked, raw):.1%} of what the bytes alone take. The first save held "
        f"it up for {first[0]:.3f} s of {first[1]:.2f} s.",
        "",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; by default that of temporary files"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(Path(folder), args.megabytes, args.turns)
    load = f"a load of {before:.1f} before it began and {os.getloadavg()[0]:.1f} after"
    result["where"] = f"{os.cpu_count()} cores, of which it has one: {machine()}; {load}"
    kept = args.out / f"checkpoint-{machine().split(',')[0].lower().replace(' ', '-')}.json"
    kept.write_text(json.dumps(result) + "\n")
    text = table(result)
    kept.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
