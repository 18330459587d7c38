"""One checkpoint on disk: its facts, its tensors, whether its bytes are still those that were written.

Without torch until a tensor is asked for, so that lists of checkpoints appear at once.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from .files import FileRecord, checksum
from .manifest import Manifest, check_size, parse_manifest, read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from .index import StoredTensor

__all__ = ["Checkpoint"]


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
    def tensors(self) -> "dict[str, StoredTensor]":
        """The shape and dtype of each tensor it holds, by name.

        Raises:
            UserError: `metadata.json` is damaged.
        """
        from .index import read_index

        return read_index(self.path)

    def names(self) -> list[str]:
        """The tensors it holds."""
        return list(self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the files that the manifest lists.

        Raises:
            UserError: the checkpoint is not whole.
        """
        return sum(record.size for record in self.manifest.files.values())

    def load_into(
        self, tensors: "Mapping[str, Tensor]", partial: bool = False, growing: Collection[str] = ()
    ) -> None:
        """Fill tensors in place with the very bits that were saved, whatever layout they were saved in.

        No rank waits for another: each reads what its own tensors need.

        Args:
            tensors: plain tensors or DTensors, on any device, by the names they were saved under.
            partial: the checkpoint may hold more tensors than these.
            growing: tensors that may have more rows than were saved; the last ones stay as they are.

        Raises:
            UserError: the checkpoint is damaged, or holds other names, shapes or dtypes. Where a file
                turns out unreadable on the way, tensors before it have been filled.
            ValueError: a tensor is on the meta device.
        """
        from .filling import fill

        fill(tensors, self.path, self.tensors, partial=partial, growing=growing)

    def convert_into(self, tensors: "Mapping[str, Tensor]", growing: Collection[str] = ()) -> None:
        """Fill some of its tensors, as `load_into` does; they may have another dtype than those saved.

        Those are read one at a time, so that no more than one is held beside its place.

        Raises:
            UserError: as `load_into`.
        """
        from .filling import convert

        convert(tensors, self.path, self.tensors, growing)

    def check_fits(self, tensors: "Mapping[str, Tensor]", partial: bool = False) -> None:
        """Look whether `load_into` could fill them; they may be on the meta device.

        Raises:
            UserError: the checkpoint holds other names, shapes or dtypes.
        """
        from .filling import check_fits

        check_fits(tensors, self.path, self.tensors, partial)

    def damages(self) -> Iterator[str]:
        """Read every byte; yields a line for each file that is missing, cut short or damaged."""
        try:
            manifest = parse_manifest(self.path)
        except UserError as error:
            yield str(error)
            return
        intact = True
        for record in manifest.files.values():
            if (damage := self.damage_of(record)) is not None:
                intact = False
                yield damage
        if intact:
            from .index import read_index

            try:
                read_index(self.path)
            except UserError as error:
                yield str(error)

    def damage_of(self, record: FileRecord) -> str | None:
        """Read a file that the manifest lists; a line where it is not as it was written."""
        path = self.path / record.name
        try:
            check_size(self.path, record)
            if checksum(path) == record.sha256:
                return None
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path}: {error.strerror}; use another checkpoint"
        return f"{path}: damaged: its checksum is not the one of manifest.json; use another checkpoint"

    def verify(self) -> None:
        """Read every byte and compare with the checksums taken when it was written.

        Raises:
            UserError: names the first file that is missing, cut short or damaged.
        """
        for damage in self.damages():
            raise UserError(damage)
