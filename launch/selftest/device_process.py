"""The process that tests one device of a node: `python -m plait.launch.selftest.device_process TASK`.

TASK is the JSON of an :class:`Errand`. The process tells what it finds on standard output, an object a line,
to the process that supervises the node (:mod:`.node`), and hears from it when to go on:

    {"ready": …}  ->  measure  ->  {"matmul": …}  ->  meet  ->  {"link": …} …  ->  leave  ->  {"end": true}

It ends when its supervisor does. A device that hangs so takes nobody along.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

__all__ = ["Errand", "count_gpus", "main"]


@dataclass(frozen=True)
class Errand:
    device: str
    """cpu or cuda."""
    index: int
    ranks: int
    node: str
    place: int
    of: int
    meet: str
    seconds: float
    """Until the deadline."""


class Supervisor:
    """The other end of standard input and output."""

    def __init__(self) -> None:
        # What a library prints is not for the supervisor.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._words: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._hear, name="plait-hear", daemon=True).start()

    def tell(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def await_word(self, word: str) -> None:
        while self._words.get() != word:
            pass

    def _hear(self) -> None:
        for line in sys.stdin:
            self._words.put(line.strip())
        os._exit(1)


def count_gpus() -> dict[str, Any]:
    """What torch knows of this node's GPUs."""
    import torch
    from torch.cuda import nccl

    if not torch.cuda.is_available():
        return {"devices": 0, "versions": {}}
    return {
        "devices": torch.cuda.device_count(),
        "versions": {
            "CUDA": torch.version.cuda or "none",
            "NCCL": ".".join(map(str, nccl.version())),
        },
    }


def main() -> None:
    supervisor = Supervisor()
    if sys.argv[1] == "gpus":
        supervisor.tell(**count_gpus())
    else:
        _run(Errand(**json.loads(sys.argv[1])), supervisor)
    # A store or a group that failed may hold the interpreter's end up.
    os._exit(0)


def _run(errand: Errand, supervisor: Supervisor) -> None:
    deadline = time.monotonic() + errand.seconds
    supervisor.tell(phase="import")
    import torch

    from .measurements import speeds

    def say(phase: str) -> None:
        supervisor.tell(phase=phase)

    def start() -> None:
        supervisor.tell(phase="ready")
        supervisor.await_word("measure")

    if errand.device == "cuda":
        device = torch.device("cuda", errand.index)
        torch.cuda.set_device(device)
        model = torch.cuda.get_device_name(device)
    else:
        device, model = torch.device("cpu"), _processor()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // errand.ranks))
    supervisor.tell(model=model)
    found = speeds(device, say, start)
    share = found.share if errand.device == "cpu" else None
    supervisor.tell(matmul=found.matmul, memory=found.memory, share=share, phase="measured")
    supervisor.await_word("meet")
    if errand.of > 1:
        _meet(errand, supervisor, device, deadline)
    supervisor.tell(phase="done", end=True)


def _meet(errand: Errand, supervisor: Supervisor, device: Any, deadline: float) -> None:
    from .meeting import Meeting

    supervisor.tell(phase="meeting")
    try:
        meeting = Meeting(errand.place, errand.of, errand.node, errand.index, errand.meet, deadline)
        meeting.assemble()
    except RuntimeError as error:
        supervisor.tell(meeting_failed=" ".join(str(error).split())[:200])
        return
    supervisor.tell(session=meeting.session, names=meeting.names)
    if errand.index == 0:
        supervisor.tell(phase="clock")
        supervisor.tell(clock=asdict(meeting.clock()))
    supervisor.tell(phase="links")
    for link in meeting.links(device):
        supervisor.tell(link=asdict(link))
    supervisor.tell(phase="linked")
    supervisor.await_word("leave")
    if errand.index == 0:
        meeting.leave()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return "processor"


if __name__ == "__main__":
    main()
