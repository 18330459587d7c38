"""How a run stands, as whoever looks at its folder can tell; without torch, and however much it has logged.

Files may be missing, cut short or half-written: what they do not say is None.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ..errors import UserError
from .checkpoint.folders import folder_step
from .checkpoint.manifest import MANIFEST_FILE, parse_manifest
from .metrics_file import parse_line, walk_back
from .run_folder import RunFolder, read_status
from .run_log import FAILED, last_note

__all__ = ["Standing", "find_runs", "standing_of"]

RECENT_STEPS = 20
"""Steps whose median speed is a run's."""

REACH = 4 << 20
"""Bytes of metrics.jsonl, from its end, in which the last validation loss is looked for."""


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Standing:
    run: str
    """Its folder."""
    state: str
    """One of

    - `running`, `finished`, `stopped`, `failed`: as its status.json says;
    - `died`: that says running, and nobody holds the folder;
    - `running?`: so it says, and another host held the folder, which not every file system shows here;
    - `busy`: the folder is held and nothing runs, for a run begins or its checkpoints are pruned;
    - `new`: it has not begun; a fork is so at first.
    """
    step: int | None = None
    steps: int | None = None
    """Where the command that was started last was to end."""
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """While it runs; without evaluations and checkpoints."""
    checkpoint: int | None = None
    """The step of the checkpoint saved last."""
    checkpoint_age: float | None = None
    """Seconds."""
    restarts: int | None = None
    """How often it was taken up."""
    quiet: float | None = None
    """Seconds since it last wrote something."""
    host: str | None = None
    """Where rank 0 is, or was."""
    pid: int | None = None
    reason: str | None = None
    """Why it stopped, failed or died, if somebody noted it."""


def find_runs(paths: Iterable[str]) -> list[RunFolder]:
    """The runs that are meant: a run's folder means itself, any other the runs in it, by name.

    Raises:
        UserError: no such folder, or one without runs.
    """
    runs: dict[Path, RunFolder] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name a run's, or one that holds runs")
        try:
            found = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()))
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; name a run's folder, or one that holds runs"
            ) from None
        if not found:
            raise UserError(f"{path}: no run is here or in its folders; name a run's, or one that holds runs")
        runs |= {one: RunFolder(one) for one in found}
    return list(runs.values())


def _is_run(path: Path) -> bool:
    try:
        return (path / "config.yaml").is_file()
    except OSError:
        return False


def standing_of(folder: RunFolder) -> Standing:
    """How a run stands now."""
    # In this order: a run that ends says so before it lets go of its folder.
    holder = folder.holder()
    status = read_status(folder)
    now = time.time()
    written, told = _modified(folder.metrics_file), _number(status.get("time"))
    done = status["step"] if type(status.get("step")) is int else None
    # Taken up at an earlier step and before it has done another, it has lost those beyond it.
    lost = done if told is not None and (written is None or told >= written) else None
    recent, validation_loss = _recent(folder.metrics_file, lost)
    step = lost if lost is not None else recent[0]["step"] if recent else done
    state = _state(status.get("state"), holder.held)
    steps = _last_step(folder)
    seconds, speeds = (_numbers(recent, key) for key in ("step_seconds", "tokens_per_second"))
    left = None
    if state in ("running", "running?") and step is not None and steps is not None and seconds:
        left = max(0, steps - step) * median(seconds)
    checkpoint, saved = _newest_checkpoint(folder.checkpoints)
    signs = [sign for sign in (written, told, saved) if sign is not None]
    starts = status.get("starts")
    return Standing(
        run=str(folder.path),
        state=state,
        step=step,
        steps=steps,
        loss=_number(recent[0].get("loss")) if recent else None,
        validation_loss=validation_loss,
        tokens_per_second=median(speeds) if speeds else None,
        seconds_left=left,
        checkpoint=checkpoint,
        checkpoint_age=max(0.0, now - saved) if saved is not None else None,
        restarts=max(0, starts - 1) if type(starts) is int else None,
        quiet=max(0.0, now - max(signs)) if signs else None,
        host=holder.host,
        pid=holder.pid,
        reason=_reason(folder, state, status.get("reason"), holder.host),
    )


def _state(said: Any, held: bool | None) -> str:
    if said == "running":
        return {True: "running", False: "died", None: "running?"}[held]
    if held:
        return "busy"
    return said if isinstance(said, str) and said else "new"


def _reason(folder: RunFolder, state: str, said: Any, host: str | None) -> str | None:
    if state == "running?":
        return f"by {host or 'a host'} whose hold of the folder cannot be seen here"
    if state in ("failed", "died"):
        # The launcher knows which rank it was.
        noted = last_note(folder.path)
        if noted is not None and noted.startswith(FAILED):
            return noted.removeprefix(FAILED)
    return said if isinstance(said, str) and state in ("stopped", "failed") else None


def _recent(metrics: Path, last: int | None) -> tuple[list[dict[str, Any]], float | None]:
    """The newest steps, newest first, and the last validation loss; of steps up to `last`."""
    recent: list[dict[str, Any]] = []
    validation_loss = None
    try:
        for step, line in walk_back(metrics, REACH):
            full = len(recent) == RECENT_STEPS
            if full and validation_loss is not None:
                break
            if (last is not None and step > last) or (full and b'"validation_loss"' not in line):
                continue
            record = parse_line(line)
            if record is not None:
                recent += [] if full else [record]
                if validation_loss is None:
                    validation_loss = _number(record.get("validation_loss"))
    except OSError:
        pass
    return recent, validation_loss


def _last_step(folder: RunFolder) -> int | None:
    try:
        train = yaml.load(folder.config_file.read_text(encoding="utf-8"), LOADER)["train"]
        ends = [train["steps"], train.get("stop_at")]
        return min(end for end in ends if type(end) is int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return None


def _newest_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """The step of the checkpoint saved last, and when that was; its tensors are not looked at."""
    found = []
    try:
        for path in folder.iterdir():
            written = _modified(path / MANIFEST_FILE)
            if folder_step(path) is not None and written is not None and (saved := _saved(path, written)):
                found.append(saved)
    except OSError:
        pass
    _, step, when = max(found, default=(None, None, None))
    return step, when


@lru_cache(maxsize=1 << 14)
def _saved(checkpoint: Path, written: float) -> tuple[int, int, float] | None:
    """Number of the save, step and time, of a checkpoint whose manifest was written then."""
    try:
        manifest = parse_manifest(checkpoint)
        return manifest.serial, manifest.step, manifest.saved.timestamp()
    except (UserError, OverflowError, ValueError):
        return None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _numbers(records: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [number for record in records if (number := _number(record.get(key))) is not None]
