"""A run's checkpoints: save without holding up training, find the newest, load into any layout.

    checkpoints/step-00000100/rank-00000.bin   tensor bytes (`storage.py`)
                              metadata.json    where each tensor lies (`index.py`)
                              manifest.json    facts, sizes, checksums (`manifest.py`)

A checkpoint is written as `.tmp-step-00000100`, brought to the disk, read back (each file by the rank
that wrote it) and renamed: it is there whole or not at all, and only then are older ones deleted. One of
the same step that it replaces waits as `.old-step-00000100` while the names change hands, and counts as
`step-00000100` if the machine dies between the two renames.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from ...errors import UserError
from .catalogue import in_order, print_warning, superfluous, survey, whole_checkpoints
from .files import CheckpointError, check_free_space, not_written
from .filling import first_cause, silence_single_process_warning
from .folders import folder_name, publish, remove, temporary_name, tidy
from .intact import from_first_rank, newest_intact
from .manifest import write_manifest
from .planning import PartSavePlanner
from .saved import Checkpoint
from .staging import Staging, local_part
from .storage import RankFileWriter, planned_bytes

__all__ = ["Checkpoints"]

MANIFEST_ROOM = 64 << 10
"""Bytes for `manifest.json` beside the facts, and for what the file system keeps of each file."""


class Checkpoints:
    """The checkpoints of a run, in one folder that all ranks share.

    With a process group, every rank calls `save` and `wait` alike.

    Attributes:
        saved: is told of each checkpoint that has come to be: its step, its bytes, and the seconds that
            writing took; with `background` by the thread that wrote it, and on one rank alone.
    """

    saved: Callable[[int, int, float], None] | None = None

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        keep_every: int | None = None,
        background: bool = False,
        warn: Callable[[str], None] | None = None,
        absence: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            folder: need not exist.
            keep: how many of the newest stay when another is saved; None keeps all.
            keep_every: those of a step that is a multiple of it stay for ever.
            background: `save` returns once the tensors are copied to CPU memory, which is then kept for
                the next save, and a thread writes them.
            warn: is told, in one line, of checkpoints that are skipped because they are not whole;
                None prints to standard error.
            absence: on rank 0, why the folder is not to be written into, such as that its disk went away;
                None where it is.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep = {keep}: the newest checkpoint always stays; keep at least 1")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every = {keep_every} is no number of steps; give 1 or more")
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.background = background
        self._warn = warn or print_warning
        self.absence = absence
        self._warned: set[str] = set()
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._preparing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Set memory aside for the copies that saving in the background makes, beside what is computed
        meanwhile: touched for the first time by a save, it would hold that one up."""
        if self.background:
            local = {name: local_part(name, tensor) for name, tensor in tensors.items()}
            self._preparing = threading.Thread(target=self._staging.reserve, args=(local,), name="staging")
            self._preparing.start()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save a checkpoint, replacing one of the same step; then delete those beyond `keep`.

        Waits first for the save before this one, and raises its failure instead of saving: a caller
        that wants to survive a `CheckpointError` calls `wait` first, and catches it there.

        Args:
            tensors: plain tensors, the same on every rank, or DTensors. Without `background` they are
                written before this returns, with it they may change as soon as it returns.
            facts: what JSON can hold.

        Raises:
            CheckpointError: the disk or the folder refused.
            TypeError, ValueError: something that is no dense tensor, or facts that are no JSON.
        """
        self.wait()
        if not 0 <= step < 10**12:
            raise ValueError(f"step = {step} is no number of a step")
        # A snapshot, as a reader will see it.
        facts = dict(json.loads(json.dumps(facts, allow_nan=False)))
        local = {name: local_part(name, tensor) for name, tensor in tensors.items()}
        if self._group is None and dist.is_available() and dist.is_initialized():
            # Its own group: the thread's messages must not meet those of training on the default one.
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        if not self.background:
            self._write(step, dict(tensors), local, facts)
            return
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        local = self._staging.copy(local)
        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(
            target=self._write_in_thread, args=(step, dict(tensors), local, facts), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once no save is under way; to be called before the process group is destroyed.

        Raises:
            CheckpointError: the disk or the folder refused the last save. Reported once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def refusal(self) -> CheckpointError | None:
        """Why the last save is not there, where the disk or the folder refused it; does not wait for one
        that is under way. Told once, by this or by `wait`."""
        if not isinstance(self._failure, CheckpointError):
            return None
        refusal, self._failure = self._failure, None
        return refusal

    def all(self) -> list[Checkpoint]:
        """All whole checkpoints in the order they were saved, the newest last."""
        return whole_checkpoints(self.folder, self._warn_once)

    def newest(self) -> Checkpoint | None:
        """The whole checkpoint that was saved last, or None."""
        found = self.all()
        return found[-1] if found else None

    def newest_intact(self) -> Checkpoint | None:
        """The one that was saved last of those whose every byte is as it was written, the same on every
        rank, which all call this; None where there are none at all. See `intact.py`.

        Raises:
            UserError: there are some, and none is intact.
        """
        newest = newest_intact(self.folder, self._warn_once)
        if newest is None and from_first_rank(lambda: any(self.folder.glob("step-*"))):
            raise UserError(
                f"{self.folder}: none of its checkpoints is whole, and a new run would bury them; move the "
                "folder away to begin anew"
            )
        return newest

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._warn(message)

    def _write_in_thread(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self._failure = error

    def _write(
        self, step: int, tensors: dict[str, Tensor], local: dict[str, Tensor], facts: dict[str, Any]
    ) -> None:
        began = time.perf_counter()
        writer = _StepWriter(self, step, facts)
        silence_single_process_warning()
        try:
            with torch.no_grad():
                dcp.save(
                    tensors,
                    storage_writer=writer,
                    planner=PartSavePlanner(local),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            if writer.is_coordinator:
                # Makes room on a full disk; what cannot be removed now is, when the next save begins.
                shutil.rmtree(writer.folder, ignore_errors=True)
            cause = first_cause(error)
            if isinstance(cause, OSError):
                raise not_written(self.folder / folder_name(step), cause) from cause
            raise cause from None
        if writer.is_coordinator:
            if self.saved is not None:
                size = sum(record.size for record in writer.files.values())
                self.saved(step, size, time.perf_counter() - began)
            self._prune()

    def _prune(self) -> None:
        if self.keep is None:
            return
        try:
            found = in_order(survey(self.folder))
        except OSError as error:
            self._warn(f"{self.folder}: older checkpoints not deleted: {error.strerror}")
            return
        for checkpoint in superfluous(found, self.keep, self.keep_every):
            try:
                remove(checkpoint.path)
            except OSError as error:
                self._warn(f"{checkpoint.path}: not deleted: {error.strerror}")


class _StepWriter(RankFileWriter):
    """Writes under a temporary name and puts the whole in its place."""

    def __init__(self, checkpoints: Checkpoints, step: int, facts: dict[str, Any]) -> None:
        super().__init__(checkpoints.folder / temporary_name(step))
        self._checkpoints = checkpoints
        self._step = step
        self._facts = facts

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        folder = self._checkpoints.folder
        if (reason := self._checkpoints.absence()) is not None:
            raise not_written(folder / folder_name(self._step), reason, "bring it back")
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        needed = planned_bytes(plans) + len(json.dumps(self._facts)) + MANIFEST_ROOM
        check_free_space(folder, needed, folder / folder_name(self._step))
        self.folder.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        found = in_order(survey(self._checkpoints.folder))
        serial = found[-1].manifest.serial + 1 if found else 1
        write_manifest(self.folder, self._step, serial, self._facts, self.files)
        publish(self.folder, self._checkpoints.folder / folder_name(self._step))
