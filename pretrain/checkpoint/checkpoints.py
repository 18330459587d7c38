"""A run's checkpoints: save without holding up training, find the newest, load into any layout.

    checkpoints/step-00000100/rank-00000.bin   tensor bytes (`storage.py`)
                              metadata.json    where each tensor lies (`index.py`)
                              manifest.json    facts, sizes, checksums (`manifest.py`)

A checkpoint is written as `.tmp-step-00000100`, brought to the disk and renamed: it is there whole
or not at all. One of the same step that it replaces waits as `.old-step-00000100` while the names
change hands, and counts as `step-00000100` if the machine dies between the two renames.
"""

import hashlib
import json
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
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
from .folders import folder_name, folder_step, publish, remove, temporary_name, tidy
from .index import StoredTensor, read_index
from .manifest import Manifest, read_manifest, write_manifest
from .planning import PartLoadPlanner, PartSavePlanner
from .staging import Staging, local_part
from .storage import RankFileReader, RankFileWriter

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]


class CheckpointError(UserError):
    """A checkpoint could not be written: the disk is full, or the folder cannot be written to.

    Older checkpoints are as they were, so that training may go on and try again at the next one.
    """


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int

    @cached_property
    def manifest(self) -> Manifest:
        """The facts saved with it, and its files.

        Raises:
            UserError: the checkpoint is not whole.
        """
        return read_manifest(self.path)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The shape and dtype of each tensor it holds, by name.

        Raises:
            UserError: `metadata.json` is damaged.
        """
        return read_index(self.path)

    def names(self) -> list[str]:
        """The tensors it holds."""
        return list(self.tensors)

    def load_into(self, tensors: Mapping[str, Tensor], partial: bool = False) -> None:
        """Fill tensors in place with the very bits that were saved, whatever layout they were saved in.

        No rank waits for another: each reads what its own tensors need.

        Args:
            tensors: plain tensors or DTensors, on any device, by the names they were saved under.
            partial: the checkpoint may hold more tensors than these.

        Raises:
            UserError: the checkpoint is damaged, or holds other names, shapes or dtypes. Where a file
                turns out unreadable on the way, tensors before it have been filled.
            ValueError: a tensor is on the meta device.
        """
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"{name!r} is on the meta device and cannot be filled; materialise it first")
        self._check_fits(tensors, partial)
        reader = RankFileReader(self.path, self.tensors)
        planner = PartLoadPlanner()
        _silence_single_process_warning()
        try:
            with torch.no_grad():
                dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise _first_cause(error) from None

    def _check_fits(self, tensors: Mapping[str, Tensor], partial: bool) -> None:
        stored = self.tensors
        missing = [name for name in tensors if name not in stored]
        unknown = [] if partial else [name for name in stored if name not in tensors]
        faults = []
        if missing:
            faults.append(f"it lacks {_few(missing)}")
        if unknown:
            faults.append(f"it also holds {_few(unknown)}")
        if faults:
            raise UserError(
                f"{self.path}: not a checkpoint of this model: {' and '.join(faults)}; "
                "use the config it was saved with, or start in another run.dir"
            )
        differ = []
        for name, tensor in tensors.items():
            here = _describe(tensor.shape, tensor.dtype)
            there = _describe(stored[name].shape, stored[name].dtype)
            if here != there:
                differ.append(f"{name} ({there} saved, {here} asked for)")
        if differ:
            raise UserError(
                f"{self.path}: not a checkpoint of this model: other shape or dtype of {_few(differ)}; "
                "use the config it was saved with, or start in another run.dir"
            )

    def verify(self) -> None:
        """Read every byte and compare with the checksums taken when it was written.

        Raises:
            UserError: names the first file that is missing, cut short or damaged.
        """
        for record in read_manifest(self.path).files.values():
            path = self.path / record.name
            try:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; use another checkpoint") from None
            if digest != record.sha256:
                raise UserError(
                    f"{path}: damaged: its checksum is not the one of manifest.json; use another checkpoint"
                )
        read_index(self.path)


class Checkpoints:
    """The checkpoints of a run, in one folder that all ranks share.

    With a process group, every rank calls `save` and `wait` alike.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        background: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            folder: need not exist.
            keep: how many of the newest stay when another is saved; None keeps all.
            background: `save` returns once the tensors are copied to CPU memory, which is then kept for
                the next save, and a thread writes them.
            warn: is told, in one line, of checkpoints that are skipped because they are not whole;
                None prints to standard error.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep = {keep}: the newest checkpoint always stays; keep at least 1")
        self.folder = folder
        self.keep = keep
        self.background = background
        self._warn = warn or _print_warning
        self._warned: set[str] = set()
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

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

    def all(self) -> list[Checkpoint]:
        """All whole checkpoints in the order they were saved, the newest last."""
        found: dict[int, Checkpoint] = {}
        # Sorted, `.old-step-00000100` comes before the `step-00000100` that supersedes it.
        for path in sorted(_entries(self.folder)):
            step = folder_step(path)
            if step is None:
                continue
            checkpoint = Checkpoint(path, step)
            try:
                if checkpoint.manifest.step != step:
                    raise UserError(f"{path}: its manifest says step {checkpoint.manifest.step}; rename it")
                found[step] = checkpoint
            except UserError as error:
                self._warn_once(path, f"checkpoint skipped: {error}")
        return sorted(found.values(), key=lambda checkpoint: (checkpoint.manifest.serial, checkpoint.step))

    def newest(self) -> Checkpoint | None:
        """The whole checkpoint that was saved last, or None."""
        found = self.all()
        return found[-1] if found else None

    def _warn_once(self, path: Path, message: str) -> None:
        # One that is gone by now was pruned meanwhile, and nobody misses it.
        if message not in self._warned and path.exists():
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
        writer = _StepWriter(self, step, facts)
        _silence_single_process_warning()
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
            cause = _first_cause(error)
            if not isinstance(cause, OSError):
                raise cause from None
            raise CheckpointError(
                f"{self.folder / folder_name(step)}: not written: {cause.strerror or cause}; make "
                "room or mend the permissions; older checkpoints are as they were"
            ) from cause
        if writer.is_coordinator:
            self._prune()

    def _prune(self) -> None:
        if self.keep is None:
            return
        for checkpoint in self.all()[: -self.keep]:
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
        self._checkpoints.folder.mkdir(parents=True, exist_ok=True)
        tidy(self._checkpoints.folder)
        self.folder.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        newest = self._checkpoints.newest()
        serial = newest.manifest.serial + 1 if newest else 1
        write_manifest(self.folder, self._step, serial, self._facts, self.files)
        publish(self.folder, self._checkpoints.folder / folder_name(self._step))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; mend the folder or choose another run.dir") from None


def _first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks that failed; DCP wraps even a KeyboardInterrupt."""
    return error.failures[min(error.failures)][0]


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _few(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _print_warning(message: str) -> None:
    print(f"plait: warning: {message}", file=sys.stderr)


def _silence_single_process_warning() -> None:
    """DCP warns, at each call, that one process is all there is, which is what it was called for."""
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning
    )
