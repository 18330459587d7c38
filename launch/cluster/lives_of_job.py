"""Inside a job: where a life of its run is started, and what follows from how it ended.

A job starts its run again as `plait launch local` does, as long as its lives bring the run further. What it
knows from one life to the next stands in `RUN/launch/life.json`.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...parallel.axes import describe_layout
from ...pretrain.config_file import load_config
from ...pretrain.fallback_layout import start_on
from ...pretrain.run_folder import RunFolder, read_status
from ...pretrain.run_log import note
from ..lives import Life
from ..rank_process import STOPPED
from .jobs import FROZEN_CONFIG, launch_folder

__all__ = ["AGAIN", "DONE", "begin_life", "end_life"]

DONE = 3
"""Status of a beginning: nothing is left to do."""

AGAIN = 100
"""Status of an end: the run is to be started again."""


def begin_life(
    run: Path, job: str, nodes: Sequence[str], gpus_per_node: int
) -> tuple[int, int, list[str]] | None:
    """Choose the layout and the nodes that the next life is started on.

    Args:
        job: tells this stay of the job in the cluster from all others.
        nodes: those that may be used.

    Returns:
        how many nodes, ranks on each, the nodes' names; None where the run is finished.

    Raises:
        UserError: the nodes hold none of the layouts, or the config is no more.
    """
    folder = RunFolder(run)
    config = load_config(launch_folder(run) / FROZEN_CONFIG)
    status = read_status(folder)
    last = min(config.train.steps, config.train.stop_at or config.train.steps)
    if status.get("state") == "finished" and status.get("step", 0) >= last:
        return None
    start = start_on(config, len(nodes), gpus_per_node)
    chosen = list(nodes[: start.nodes])
    record = _read(run)
    life = Life.first(folder.checkpoints)
    if record.get("job") == job:
        life = Life(record["step"], record["serial"], record["restarts"])
    else:
        _clear_own_stop(folder)
        layout = (
            "" if start.fallback is None else f", fallback layout {describe_layout(start.fallback.sizes)}"
        )
        ranks = start.nodes * start.ranks_a_node
        note(run, f"job {job}: {ranks} rank{'s' if ranks > 1 else ''} on {','.join(chosen)}{layout}")
    _write(run, job, life)
    return start.nodes, start.ranks_a_node, chosen


def end_life(run: Path, job: str) -> tuple[int, str]:
    """What follows from the end of a life.

    Returns:
        the exit status that says it: 0 the run reached its last step, 75 it was asked to stop and has saved,
        2 a mistake ended it, 100 it is to be started again, 1 it is not; and a line about it.

    Raises:
        UserError: the folder of checkpoints cannot be listed.
    """
    folder = RunFolder(run)
    record, status = _read(run), read_status(folder)
    # What an earlier life wrote says nothing of this one.
    told = float(status.get("time") or 0) >= float(record["began"])
    state, reason = (status.get("state"), status.get("reason")) if told else (None, None)
    if state == "finished" or (state == "stopped" and not reason):
        return 0, f"{state} at step {status['step']}"
    if state == "stopped":
        return STOPPED, f"stopped at step {status['step']}: {reason}"
    why = f"failed: {reason}" if state == "failed" else "ranks ended without a word"
    if state == "failed" and status.get("mistake"):
        return 2, why
    config = load_config(launch_folder(run) / FROZEN_CONFIG)
    life = Life(record["step"], record["serial"], record["restarts"]).following(folder.checkpoints)
    most = config.launch.max_restarts
    if life.restarts > most:
        return (
            1,
            f"no progress beyond {life.place} after {most} restart{'s' if most > 1 else ''}, which is "
            f"launch.max_restarts; {why}",
        )
    _write(run, job, life)
    line = f"{why}; going on from {life.place} (restart {life.restarts} of {most})"
    note(run, line)
    return AGAIN, line


def _clear_own_stop(folder: RunFolder) -> None:
    """Take away what a job that was ended too early wrote to stop its ranks; a person's wish stays."""
    try:
        if folder.stop_file.read_text(encoding="utf-8").startswith("Slurm job "):
            folder.stop_file.unlink()
    except (OSError, ValueError):
        pass


def _read(run: Path) -> dict:
    try:
        return json.loads((launch_folder(run) / "life.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(run: Path, job: str, life: Life) -> None:
    file = launch_folder(run) / "life.json"
    text = json.dumps({"job": job, "began": time.time(), **asdict(life)})
    written = file.with_suffix(".tmp")
    written.write_text(text + "\n", encoding="utf-8")
    os.replace(written, file)
