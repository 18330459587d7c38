"""How often a run whose ranks died is started again: as long as its lives bring it further.

`plait launch` asks before each life after the first. torchrun knows nothing of checkpoints: there the first
rank asks when it starts, and keeps the count in the run's folder from one life to the next.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..pretrain.checkpoint.catalogue import whole_checkpoints
from ..pretrain.run_folder import RunFolder

__all__ = ["Life", "begin_under_torchrun"]


@dataclass(frozen=True)
class Life:
    """Where a life of a run begins."""

    step: int | None
    """Of the newest whole checkpoint; None where there is none."""
    serial: int
    """Which of the run's saves that was; 0 where there is none."""
    restarts: int = 0
    """How many lives, up to this one, were begun after a death: since the launch, or since one that left a
    newer checkpoint than it began with."""

    @classmethod
    def first(cls, checkpoints: Path) -> "Life":
        """
        Raises:
            UserError: the folder of checkpoints cannot be listed.
        """
        # The ranks will tell of those that are not whole.
        found = whole_checkpoints(checkpoints, lambda _: None)
        return cls(found[-1].step, found[-1].manifest.serial) if found else cls(None, 0)

    def following(self, checkpoints: Path) -> "Life":
        """The life after this one, which ended badly.

        Raises:
            UserError: the folder of checkpoints cannot be listed.
        """
        now = Life.first(checkpoints)
        return replace(now, restarts=1 if now.serial > self.serial else self.restarts + 1)

    @property
    def place(self) -> str:
        return "the start" if self.step is None else f"step {self.step}"


def begin_under_torchrun(folder: RunFolder, max_restarts: int) -> float:
    """Count a life that torchrun began; for the first rank.

    Returns:
        seconds since the first life of the launch began.

    Raises:
        UserError: `max_restarts` lives in a row, all of the same launch, left no newer checkpoint.
    """
    launcher, now = _launcher(), time.time()
    record = _read(folder.lives_file)
    # The count of restarts is that of one machine's launcher, and another's rank may be the first by now.
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    same = record.get("run_id") == run_id and (record.get("launcher") == launcher or count > 0)
    began = now
    life = Life.first(folder.checkpoints)
    if same:
        began = float(record["began"])
        before = Life(record["step"], int(record["serial"]), int(record["restarts"]))
        life = before.following(folder.checkpoints)
    if life.restarts > max_restarts:
        raise UserError(
            f"no progress beyond {life.place} after {max_restarts} restart(s), which is launch.max_restarts; "
            f"what ended them stands in {folder.log_file(0).parent}: mend it and start the command again"
        )
    written = folder.lives_file.with_suffix(".tmp")
    text = json.dumps({"run_id": run_id, "launcher": launcher, "began": began, **asdict(life)})
    written.write_text(text + "\n", encoding="utf-8")
    os.replace(written, folder.lives_file)
    return now - began


def _read(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _launcher() -> str:
    """Names the process that started this one, also among others that bear its number at another time."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = ""
    return f"{socket.gethostname()} {parent} {began}"
