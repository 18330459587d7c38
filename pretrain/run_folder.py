"""A run's folder: where its config, metrics, logs, tokenizer and checkpoints lie."""

import errno
import fcntl
import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.manifest import manifest_of
from ..data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ..errors import UserError
from .config import Config
from .config_file import dump_config, load_config
from .growing_vocabulary import check_first_ids

__all__ = ["Holder", "RunFolder", "mistakes_told", "read_status", "write_status"]

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 0.2
"""Seconds to wait for the lock: whoever only looks whether it is free has it for a moment."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a folder, or was the last to do so."""

    held: bool | None
    """Whether it holds the folder still; None where that cannot be seen: it was on another host, and not
    every file system shows its locks to all."""
    pid: int | None
    host: str | None


class RunFolder:
    """Paths of a run; nothing is made before `prepare`.

    Raises:
        UserError: the path is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._locked: tuple[os.stat_result, str] | None = None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir = {self.path} is a file; choose another folder")

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The folder of a run that exists.

        Raises:
            UserError: no run is there.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise UserError(f"{folder.path}: no run is here (it has no config.yaml); name a run's folder")
        return folder

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def stop_file(self) -> Path:
        """Whoever makes it asks the run to stop."""
        return self.path / "stop"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def lives_file(self) -> Path:
        """The first rank's count of its lives, where torchrun starts them."""
        return self.path / "lives.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    def log_file(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank:05d}.log"

    def job_log(self, number: int) -> Path:
        """What a job on a cluster prints."""
        return self.path / "logs" / f"slurm-{number}.log"

    def config(self) -> Config:
        return load_config(self.config_file)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the run's corpus was made with; None where the corpus came without one."""
        found = find_tokenizer(self.path)
        return load_tokenizer(found) if found else None

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.log_file(0).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir = {self.path}: {error.strerror}; choose another folder") from None

    def lock(self) -> io.TextIOBase:
        """Keep every other process from training here until the returned file is closed.

        The file says which process it is, and on which host.

        Raises:
            UserError: a process is training here.
        """
        self.make()
        # Not emptied before it is ours: it says who trains here.
        file = self.lock_file.open("a", encoding="utf-8")
        patience = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < patience:
                    time.sleep(LOCK_PATIENCE / 10)
                    continue
                file.close()
                raise UserError(
                    f"run.dir = {self.path}: another process is training here; wait for it, or "
                    "choose another folder"
                ) from None
        file.truncate(0)
        holder = f"{os.getpid()} {socket.gethostname()}\n"
        file.write(holder)
        file.flush()
        self._locked = self.path.stat(), holder
        return file

    def holder(self) -> "Holder":
        """Who holds the folder, as far as can be seen from this host."""
        try:
            with self.lock_file.open("rb") as file:
                words = file.read(1024).decode(errors="replace").split()
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    held = False
                except BlockingIOError:
                    held = True
                except OSError:
                    held = None
        except FileNotFoundError:
            return Holder(False, None, None)
        except OSError:
            return Holder(None, None, None)
        pid, host = (words + ["", ""])[:2]
        if not held and host and host != socket.gethostname():
            held = None
        return Holder(held, int(pid) if pid.isdecimal() else None, host or None)

    def absence(self) -> str | None:
        """Why the path no longer leads to the folder that this process locked, as when a disk went away and
        left its empty mount point; None where it does, or nothing was locked."""
        if self._locked is None:
            return None
        status, holder = self._locked
        try:
            if os.path.samestat(status, self.path.stat()):
                return None
            # A disk that was mounted again may have another number.
            if self.lock_file.read_text(encoding="utf-8") == holder:
                return None
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            return f"{self.path}: {error}"
        return f"{self.path} is no longer the folder that the run began in"

    def prepare(self, config: Config, initial: "RunFolder | None" = None) -> None:
        """Make the folder, bring the corpus's tokenizer and write the config into it.

        Args:
            initial: the run whose weights this one begins with, and so its tokenizer.

        Raises:
            UserError: it cannot be written to, or the corpus's tokenizer is not the run's, or has more
                ids than the model has rows.
        """
        self.make()
        try:
            self._bring_tokenizer(config, initial)
            _write_whole(self.config_file, dump_config(config))
        except OSError as error:
            raise UserError(f"run.dir = {self.path}: {error.strerror}; choose another folder") from None

    def _bring_tokenizer(self, config: Config, initial: "RunFolder | None") -> None:
        theirs = initial.tokenizer() if initial else None
        held_out = config.data.validation
        for prefix in [*config.shards(), *([held_out] if held_out else [])]:
            manifest = manifest_of(prefix)
            if manifest is None:
                continue
            if initial and theirs:
                grows = config.checkpoint.grow_vocabulary
                check_first_ids(prefix, manifest, theirs, initial.path, grows=grows)
            if manifest.vocab_size > config.model.vocab_size:
                raise UserError(
                    f"model.vocab_size = {config.model.vocab_size} has fewer rows than the tokenizer of "
                    f"{prefix} has ids; set model.vocab_size = {manifest.vocab_size} or more"
                )
            source = find_tokenizer(Path(prefix).parent)
            here = self.tokenizer()
            if here is not None and here.fingerprint != manifest.tokenizer_sha256:
                raise UserError(
                    f"{prefix}: built with another tokenizer than the one of {self.path}; "
                    "rebuild the corpus with that one, or choose another run.dir"
                )
            if here is None and source is not None:
                load_tokenizer(source).save_into(self.path)
        if theirs and self.tokenizer() is None:
            theirs.save_into(self.path)


def write_status(
    folder: RunFolder, state: str, step: int, reason: str | None = None, *, mistake: bool = False
) -> None:
    """Say how a run stands, for who looks at its folder, and how often it was started.

    Args:
        state: running (which counts as a start), finished, stopped (the same command goes on) or failed.
        mistake: it failed of a `UserError`, which the same command would meet again.

    Where the disk refuses, a warning says so.
    """
    starts = read_status(folder).get("starts")
    starts = (starts if isinstance(starts, int) else 0) + (state == "running")
    status = {"state": state, "step": step, "reason": reason, "starts": starts, "time": time.time()}
    if mistake:
        status["mistake"] = True
    try:
        if (absence := folder.absence()) is not None:
            raise OSError(errno.ENOENT, absence)
        _write_whole(folder.status_file, json.dumps(status) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        logger.warning("%s: cannot be written: %s; the run is %s", folder.status_file, reason, state)


@contextmanager
def mistakes_told(folder: RunFolder) -> Iterator[None]:
    """Let the run's status say so where any of its ranks meets a `UserError`: every further life would."""
    try:
        yield
    except UserError as error:
        step = read_status(folder).get("step")
        write_status(folder, "failed", step if isinstance(step, int) else 0, str(error), mistake=True)
        raise


def read_status(folder: RunFolder) -> dict[str, Any]:
    """What `write_status` wrote last; nothing where it never did."""
    try:
        status = json.loads(folder.status_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
