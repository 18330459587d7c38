"""A run of two ranks that is killed, starved of disk and robbed of files, at moments drawn from a seed.

`make chaos`, or `python tests/chaos/chaos.py [--seed N] [--events N] [--torchrun] [--write]`. The run is the
plain command, started with `plait launch local` or torchrun; `hook/` acts inside its ranks, `scene.py` looks
on. After each event it must go on from the newest checkpoint that was whole, or intact where files were
harmed; no process of before may be left, and every other checkpoint must be as it was. At the end it is
asked to stop, and compared with a run that nobody disturbed: every metric of every step, and the tensors
of the last checkpoint. Prints a table; `--write` puts it into `benchmarks/results`; status 1 where anything
failed.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from scene import EVERY, Scene, make_config

from plait.errors import UserError, few
from plait.pretrain.checkpoint import Checkpoint
from plait.pretrain.metrics_file import read_metrics

__all__ = ["KINDS", "Chaos", "Row"]

DEATHS = ("one rank", "all ranks", "launcher")
"""Who gets SIGKILL."""

HARMS = ("cut short", "missing", "a bit flipped")
"""What befalls a file of the newest checkpoint between two commands."""

KINDS = [
    *(("between steps", deed) for deed in (*DEATHS, "SIGTERM")),
    *(("save", deed) for deed in (*DEATHS, "disk full")),
    *(("rename", deed) for deed in DEATHS),
    ("reading a save back", "one rank"),
    ("deleting an older one", "one rank"),
    *(("evaluation", deed) for deed in ("one rank", "all ranks")),
    ("start", "one rank"),
    ("loading", "all ranks"),
    *(("between commands", deed) for deed in HARMS),
]
"""Moments and deeds; twenty of them in all."""

TIMES = ("time", "tokens_per_second", "step_seconds", "data_seconds", "mfu") + (
    "slowest_rank",
    "slowest_share",
    "stragglers",
    "straggler_places",
)
"""Metrics that no two runs share."""


@dataclass
class Row:
    """An event and what came of it."""

    moment: str
    deed: str
    before: int = 0
    """The last step that was recorded."""
    resumed: int | None = None
    """The step it went on from; None where it did not die."""
    seconds: float = 0.0
    """From the deed to the first step afterwards."""
    faults: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[str]:
        resumed = "did not die" if self.resumed is None else str(self.resumed)
        outcome = "; ".join(self.faults) or "as it should"
        return [self.moment, self.deed, str(self.before), resumed, f"{self.seconds:.1f}", outcome]


class Chaos:
    """Events upon a scene, one after the other."""

    def __init__(self, scene: Scene, draw: random.Random) -> None:
        self.scene, self.draw = scene, draw
        self.harmed: dict[Path, int] = {}

    def suffer(self, moment: str, deed: str) -> Row:
        """Wait until the run has got further, do the deed, and wait until it has got over it."""
        row = Row(moment, deed)
        self._wait_for_progress()
        if moment == "between commands":
            self._harm(row)
        elif deed == "disk full":
            self._fill_the_disk(row)
        elif deed == "SIGTERM":
            self._stop_politely(row)
        else:
            self._kill(row)
        return row

    def _wait_for_progress(self) -> None:
        """Until two checkpoints have come since the last event, one at least since it went on."""
        steps = self.scene.steps()
        goal = max(steps[-1] if steps else 0, EVERY) + EVERY + self.draw.randint(1, EVERY)
        self.scene.wait_until(lambda: (found := self.scene.steps()) and found[-1] >= goal)

    def _kill(self, row: Row) -> None:
        scene, launcher = self.scene, self.scene.launcher
        assert launcher is not None
        old = scene.processes()
        time.sleep(self.draw.uniform(0, 0.3))
        began = time.time()
        if row.moment != "between steps":
            self._arm(row)
        if row.moment in ("start", "loading"):
            # Only a life that begins comes there.
            kill(scene, old)
        elif row.moment == "between steps":
            one = self.draw.choice(old)
            kill(scene, {"one rank": [one], "all ranks": old, "launcher": [launcher.pid]}[row.deed])
        if row.moment != "between steps":
            scene.wait_until(self._done.exists, alive=False)
            began = json.loads(self._done.read_text())["time"]
            self._done.unlink()
        if row.deed == "launcher":
            scene.wait_for_end()
        scene.wait_until(lambda: not any(map(scene.lives, old)), alive=False)
        self._go_on(row, began, restart=row.deed == "launcher")

    def _stop_politely(self, row: Row) -> None:
        launcher = self.scene.launcher
        assert launcher is not None
        began = time.time()
        launcher.send_signal(signal.SIGTERM)
        status = self.scene.wait_for_end()
        if status != 75 and not self.scene.torchrun:
            row.faults.append(f"status {status}")
        if (newest := self.scene.checkpoints()[-1].step) != self.scene.steps()[-1]:
            row.faults.append(f"stopped after step {self.scene.steps()[-1]} and saved step {newest}")
        self._go_on(row, began, restart=True)

    def _harm(self, row: Row) -> None:
        """Kill the run and harm a file of its newest checkpoint before it is started again."""
        launcher = self.scene.launcher
        assert launcher is not None
        began = time.time()
        launcher.kill()
        self.scene.wait_for_end()
        newest = self.scene.checkpoints()[-1]
        file = newest.path / self.draw.choice([*sorted(newest.manifest.files), "manifest.json"])
        content = bytearray(file.read_bytes())
        if row.deed == "missing":
            file.unlink()
        elif row.deed == "cut short":
            file.write_bytes(content[: self.draw.randrange(len(content))])
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content)
        row.deed = f"{file.name} {row.deed}"
        self.harmed[newest.path] = newest.path.stat().st_ctime_ns
        self._go_on(row, began, restart=True)

    def _fill_the_disk(self, row: Row) -> None:
        """Until a save has failed, and told of it; the run goes on and the next one is there."""
        scene = self.scene
        row.before, began = scene.steps()[-1], time.time()
        newest = scene.checkpoints()[-1]
        said = self._said("not written: ")
        ballast = scene.run / "checkpoints" / "ballast"
        if os.path.ismount(ballast.parent):
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 14)):
                    pass
        else:
            self._arm(row)
        scene.wait_until(lambda: self._said("not written: ") > said)
        self._check_others(row)
        ballast.unlink(missing_ok=True)
        self._done.unlink(missing_ok=True)
        scene.wait_until(lambda: scene.checkpoints()[-1].manifest.serial > newest.manifest.serial)
        row.seconds = time.time() - began

    def _go_on(self, row: Row, began: float, *, restart: bool) -> None:
        """All ranks are dead: what is there is what it must go on from."""
        scene = self.scene
        steps, starts, whole = scene.steps(), len(scene.starts()), self._intact()
        row.before, expected = steps[-1], whole[-1].step
        # One save may have been under way, in which training goes on; and what was harmed is lost.
        if row.before - expected >= (2 + len(self.harmed)) * EVERY:
            row.faults.append(f"more than an interval is lost: the newest intact one is of step {expected}")
        if not restart and scene.launcher is not None and scene.launcher.poll() is not None:
            row.faults.append("the launcher ended")
            restart = True
        if restart:
            scene.start()
        scene.wait_until(lambda: len(scene.starts()) > starts)
        row.resumed = resumed = scene.starts()[starts]
        scene.wait_until(lambda: any(step > resumed for step in scene.steps()[len(steps) :]))
        row.seconds = time.time() - began
        if row.resumed != expected:
            row.faults.append(f"step {expected} was the newest intact checkpoint")
        self._check_others(row)

    def _check_others(self, row: Row) -> None:
        """Checkpoints that nobody harmed hold what was written; one may be deleted for its age meanwhile."""
        for checkpoint in self._intact():
            try:
                checkpoint.verify()
            except UserError as error:
                if checkpoint.path.exists():
                    row.faults.append(str(error))

    def _intact(self) -> list[Checkpoint]:
        """Whole ones that were not harmed, or were since saved anew."""
        for path in list(self.harmed):
            if not path.exists() or path.stat().st_ctime_ns != self.harmed[path]:
                del self.harmed[path]
        return [one for one in self.scene.checkpoints() if one.path not in self.harmed]

    @property
    def _done(self) -> Path:
        return self.scene.folder / "done.json"

    def _arm(self, row: Row) -> None:
        pass_by = 0 if row.moment == "start" else self.draw.randint(0, 1)
        order = {"moment": row.moment, "deed": row.deed, "pass_by": pass_by}
        written = self.scene.folder / "order.json"
        written.write_text(json.dumps(order))
        os.replace(written, self.scene.folder / "armed.json")

    def _said(self, text: str) -> int:
        return (self.scene.folder / "output").read_text(errors="replace").count(text)


def kill(scene: Scene, processes: list[int]) -> None:
    for process in filter(scene.lives, processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def finish(scene: Scene, folder: Path) -> tuple[Row, float]:
    """Ask the run to stop; compare it with one that goes to the same step undisturbed.

    Returns:
        the last row, and the seconds from the other run's command to its first step.
    """
    row = Row("the end", "a file named stop", scene.steps()[-1])
    (scene.run / "stop").touch()
    began = time.time()
    status = scene.wait_for_end()
    row.seconds = time.time() - began
    if status != (0 if scene.torchrun else 75):
        row.faults.append(f"status {status}")
    if left := scene.leftovers():
        row.faults.append(f"processes are left: {left}")
    last = scene.checkpoints()[-1]
    calm = Scene(folder / "calm", scene.config, folder / "calm-run")
    calm_began = time.time()
    calm.start(f"train.stop_at={last.step}")
    calm.wait_until(calm.steps)
    seconds = time.time() - calm_began
    if status := calm.wait_for_end():
        raise RuntimeError((calm.folder / "output").read_text())
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (scene.run, calm.run))
    # Steps beyond the last one are of a life that died; the next would do them again.
    ours = [record for record in ours if record["step"] <= last.step]
    for a, b in zip(ours, theirs, strict=True):
        differ = [key for key in a.keys() | b.keys() if key not in TIMES and a.get(key) != b.get(key)]
        if differ:
            row.faults.append(f"step {a['step']} has another {differ[0]} than the undisturbed run's")
            break
    saved, undisturbed = (tensors_of(one) for one in (last, calm.checkpoints()[-1]))
    differ = [name for name in saved if not torch.equal(saved[name], undisturbed[name])]
    row.faults += [f"{few(differ)} of the last checkpoint differ"] if differ else []
    return row, seconds


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All but torch's random state: a run begins with any, and draws nothing from it."""
    stored = {name: one for name, one in checkpoint.tensors.items() if name != "rng.cpu"}
    tensors = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in stored.items()}
    checkpoint.load_into(tensors, partial=True)
    return tensors


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 16 MiB at `folder`, where this process may make one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def drawn(events: int, draw: random.Random) -> list[tuple[str, str]]:
    """Every kind once before any comes again, in a random order."""
    kinds: list[tuple[str, str]] = []
    while len(kinds) < events:
        kinds += draw.sample(KINDS, len(KINDS))
    return kinds[:events]


def run(
    kinds: list[tuple[str, str]], draw: random.Random, folder: Path, torchrun: bool = False
) -> tuple[list[Row], float]:
    """The events in turn, then the comparison; a row is printed as soon as it is known.

    Returns:
        the rows, and the seconds that an undisturbed run takes from its command to its first step.
    """
    config = make_config(folder)
    rows = []
    with small_disk(folder / "run" / "checkpoints"):
        scene = Scene(folder / "scene", config, folder / "run", torchrun)
        chaos = Chaos(scene, draw)
        try:
            scene.start()
            for kind in kinds:
                rows.append(chaos.suffer(*kind))
                print(line(rows[-1].cells), flush=True)
            end, seconds = finish(scene, folder)
            rows.append(end)
            print(line(rows[-1].cells), flush=True)
        finally:
            kill(scene, scene.leftovers())
    return rows, seconds


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


HEAD = ["moment", "done", "last step before", "went on from", "seconds to a new step", "outcome"]


def main() -> int:
    parser = argparse.ArgumentParser(description="A run of two ranks, disturbed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", type=int, default=len(KINDS))
    parser.add_argument("--torchrun", action="store_true", help="instead of plait launch local")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/results")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    print(f"{line(HEAD)}\n{line(['---'] * len(HEAD))}", flush=True)
    with tempfile.TemporaryDirectory(prefix="plait-chaos-") as folder:
        rows, seconds = run(drawn(options.events, draw), draw, Path(folder), options.torchrun)
    faults = sum(bool(row.faults) for row in rows)
    print(f"\n{len(rows) - 1} events, seed {options.seed}: {faults or 'no'} faults")
    print(f"from an undisturbed command to its first step: {seconds:.1f} s")
    if options.write:
        write(rows, seconds, options.seed, options.torchrun)
    return int(faults > 0)


def write(rows: list[Row], seconds: float, seed: int, torchrun: bool) -> None:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    launcher, option = ("torchrun", " --torchrun") if torchrun else ("plait launch local", "")
    lines = [
        f"# {len(rows) - 1} events upon a run of two ranks, under {launcher}",
        "",
        f"`python tests/chaos/chaos.py --seed {seed} --events {len(rows) - 1}{option} --write`. "
        f"{date.today()}, {model}, {os.cpu_count()} cores with a load of {os.getloadavg()[2]:.0f}, "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"A checkpoint every {EVERY} steps, an evaluation every 6. Who is killed gets SIGKILL. Seconds are "
        "from the deed, at the start and in loading from the second death, to the first step afterwards. "
        f"An undisturbed command came to its first step in {seconds:.1f} s.",
        "",
        *(line(cells) for cells in [HEAD, ["---"] * len(HEAD), *(row.cells for row in rows)]),
        "",
        "The end: no process was left, all metrics of all steps and the tensors of the last checkpoint are "
        "those of a run that nobody disturbed."
        if not rows[-1].faults
        else "The end is not that of a run that nobody disturbed.",
    ]
    name = f"chaos-{'torchrun-' if torchrun else ''}{slug}.md"
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    (results / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
