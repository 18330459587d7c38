"""Loaded by every interpreter of a run under chaos, from its PYTHONPATH: does a deed at a moment of a rank.

The run itself is the plain command; what it does is seen by what it opens and renames. `PLAIT_CHAOS` names a
folder: each rank says there that it lives (`ranks/PID`), and the first one to come to the moment of
`armed.json` takes it away, notes in `done.json` when that was, and does the deed.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("PLAIT_CHAOS", ""))


def moment_of(event: str, args: tuple) -> str | None:
    """The moment of a run that an operation on a file belongs to."""
    if event not in ("open", "os.rename") or not isinstance(args[0], str | os.PathLike):
        return None
    path = Path(args[0])
    if event == "os.rename":
        if Path(args[1]).name.startswith(".tmp-removed-"):
            return "deleting an older one"
        return "rename" if path.name.startswith(".tmp-step-") else None
    if path.parent.name.startswith(".tmp-step-"):
        return "save" if args[2] & (os.O_WRONLY | os.O_RDWR) else "reading a save back"
    if path.name == "validation.idx":
        return "evaluation"
    return "loading" if path.name == "metadata.json" else None


def do(deed: str) -> None:
    if deed == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if deed == "launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        return
    if deed == "all ranks":
        for file in (FOLDER / "ranks").iterdir():
            if int(file.name) != os.getpid() and is_ours(file.name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def is_ours(process: str) -> bool:
    """Whether the number of a rank is still that of one: numbers are used again."""
    try:
        environment = Path("/proc", process, "environ").read_bytes()
    except OSError:
        return False
    return f"PLAIT_CHAOS={FOLDER}\0".encode() in environment and b"\0RANK=" in environment


def come_to(moment: str) -> None:
    armed = FOLDER / "armed.json"
    try:
        order = json.loads(armed.read_text())
        if order["moment"] != moment:
            return
        if order["pass_by"]:
            os.replace(armed, FOLDER / f"taken-{os.getpid()}.json")
            write(armed, order | {"pass_by": order["pass_by"] - 1})
            return
        # Of several that come at once, the rename lets one through.
        os.replace(armed, FOLDER / f"taken-{os.getpid()}.json")
    except FileNotFoundError:
        return
    write(FOLDER / "done.json", {"time": time.time(), "rank": int(os.environ["RANK"])})
    do(order["deed"])


def write(file: Path, content: dict) -> None:
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(json.dumps(content))
    os.replace(written, file)


def watch() -> None:
    busy = False

    def hear(event: str, args: tuple) -> None:
        nonlocal busy
        if busy or (moment := moment_of(event, args)) is None:
            return
        busy = True
        try:
            come_to(moment)
        finally:
            busy = False

    (FOLDER / "ranks" / str(os.getpid())).touch()
    come_to("start")
    sys.addaudithook(hear)


if "PLAIT_CHAOS" in os.environ and "RANK" in os.environ:
    watch()
