"""How a rank says why it failed, and how the failures of many ranks become one line.

A rank leaves its record in the file that torch's elastic launcher names to it, in a form that torchrun
shows too; `plait launch` reads the records of all ranks and names the rank that failed first.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from ..errors import UserError

__all__ = ["Ended", "Failure", "Kind", "failure_of", "hang_line", "stacks", "tell", "verdict"]

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

BROKEN_CONNECTIONS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "Socket closed",
    "remote process exited",
    "gloo/transport",
)
"""Parts of what gloo, NCCL and the store say when another rank is gone."""


NO_ANSWER = "without an answer (stopped, or in native code: its log may say more)"


class Kind(StrEnum):
    MISTAKE = "mistake"
    """A `UserError`."""
    ERROR = "error"
    ECHO = "echo"
    """Another rank is gone, and its connections with it: not why the run failed."""
    HANG = "hang"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended; `place` and `stacks` are those of a hang, `since` its last sign of progress."""

    rank: int
    kind: Kind
    message: str
    since: str = ""
    place: str = ""
    stacks: str = ""
    time: float = field(default_factory=time.time)

    def record(self) -> None:
        """Leave this for the launcher, if there is one and it was told nothing yet."""
        file = os.environ.get(ERROR_FILE)
        if not file or os.path.exists(file):
            return
        written = Path(f"{file}.{os.getpid()}")
        extra = {"py_callstack": self.message, "timestamp": str(int(self.time))}
        content = {"message": {"message": self.message, "extraInfo": extra}, "failure": asdict(self)}
        written.write_text(json.dumps(content), encoding="utf-8")
        os.replace(written, file)

    def with_hint(self, hint: str) -> "Failure":
        return replace(self, message=f"{self.message}; {hint}")

    @property
    def cause(self) -> str:
        """The message without what is this rank's alone."""
        return self.message.partition(":")[0]

    @property
    def status(self) -> int:
        """The exit status that the run deserves."""
        return 2 if self.kind is Kind.MISTAKE else 1


class Ended(Protocol):
    """What the elastic launcher knows of a rank that ended badly: its `ProcessFailure`."""

    exitcode: int
    error_file_data: Any


def failure_of(error: BaseException, rank: int) -> tuple[Failure, BaseException]:
    """What to say of an error that escaped on this rank, and the error that is meant.

    An error met while another was handled, such as a broken connection in a clean-up, does not hide it.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if _is_echo(chain[-1]):
        meant, kind = error, Kind.ECHO
    else:
        meant = next(link for link in chain if not _is_echo(link))
        kind = Kind.MISTAKE if isinstance(meant, UserError) else Kind.ERROR
    text = " ".join(str(meant).split())[:500]
    if not isinstance(meant, UserError):
        text = f"{type(meant).__name__}: {text}" if text else type(meant).__name__
    return Failure(rank, kind, text), meant


def verdict(ended: Mapping[int, Ended], ranks: int) -> tuple[str, int]:
    """Which rank failed, and of what.

    Args:
        ended: by rank, those that ended badly, in the order in which that was seen; with them those
            that were then told to end.
        ranks: how many there were.

    Returns:
        line: what to tell, without "plait: error:".
        status: of the whole, 2 for a `UserError`, else 1.
    """
    records = {rank: read for rank, one in ended.items() if (read := _read(one)) is not None}
    originals = sorted((r for r in records.values() if r.kind is not Kind.ECHO), key=lambda r: r.time)
    first = next(iter(ended))
    if originals and originals[0].kind is Kind.HANG:
        return hang_line(originals[0], records, ranks), 1
    # A rank that raised lingers before it ends, so one that is seen ended without a word is the cause.
    if first not in records:
        return f"rank {first} {_end_without_words(ended[first].exitcode)}", 1
    failure = originals[0] if originals else min(records.values(), key=lambda r: r.time)
    everywhere = len(records) == ranks and len({r.message for r in records.values()}) == 1
    return failure.message if everywhere else f"rank {failure.rank}: {failure.message}", failure.status


def stacks(ended: Mapping[int, Ended]) -> str:
    """The stacks of all ranks that hung."""
    records = [read for one in ended.values() if (read := _read(one)) is not None and read.stacks]
    return "".join(f"rank {r.rank}:\n{r.stacks}" for r in sorted(records, key=lambda r: r.rank))


def tell(text: str) -> None:
    """Print to standard error; on a terminal, after wiping a live line that nobody lives to wipe."""
    wipe = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() and sys.stdout.isatty() else ""
    sys.stderr.write(f"{wipe}{text}\n")
    sys.stderr.flush()


def _is_echo(error: BaseException) -> bool:
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in BROKEN_CONNECTIONS)


def _read(ended: Ended) -> Failure | None:
    data = ended.error_file_data
    record = data.get("failure") if isinstance(data, dict) else None
    return Failure(**{**record, "kind": Kind(record["kind"])}) if record else None


def hang_line(first: Failure, records: Mapping[int, Failure], ranks: int) -> str:
    """Where each of a number of ranks stood in a hang, the few before the many.

    Args:
        first: of the rank that spoke first.
        records: by rank, of those that have spoken.
    """
    where: dict[str, list[int]] = {}
    for rank in range(ranks):
        record = records.get(rank)
        hung = record is not None and record.kind is Kind.HANG
        at = f"in {record.place} since {record.since}" if record is not None and hung else NO_ANSWER
        where.setdefault(at, []).append(rank)
    groups = sorted(where.items(), key=lambda group: len(group[1]))
    listed = "; ".join(
        f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))} {at}" for at, members in groups
    )
    return f"{first.cause}: {listed}"


def _end_without_words(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with status {exitcode} and left no word"
    try:
        name = f" ({signal.Signals(-exitcode).name})"
    except ValueError:
        name = ""
    hint = "; a machine out of memory does that" if -exitcode == signal.SIGKILL else ""
    return f"was killed by signal {-exitcode}{name}{hint}"
