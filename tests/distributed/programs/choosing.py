"""The checkpoint that all ranks take, where what they see of the disk differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from plait.errors import UserError
from plait.pretrain.checkpoint import Checkpoint, Checkpoints, intact


def unseen(folder: Path, record: Any) -> None:
    if folder.name != "step-00000001":
        raise UserError(f"{folder / record.name}: No such file or directory; use another checkpoint")


def run(folder: str, blind: int | None = None) -> dict[str, Any]:
    """What this rank takes, what it warns of, and the files it read.

    Args:
        blind: a rank that sees the oldest checkpoint alone.
    """
    path, warned, read = Path(folder), [], []
    if dist.get_rank() == blind == 0:
        path = path.with_name(f"seen-by-{blind}")
        shutil.copytree(folder, path)
        for newer in sorted(path.iterdir())[1:]:
            shutil.rmtree(newer)
    honest = Checkpoint.damage_of

    def damage_of(self: Checkpoint, record: Any) -> str | None:
        read.append(f"{self.step}/{record.name}")
        return honest(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "damage_of", damage_of)
        if blind and dist.get_rank() == blind:
            patch.setattr(intact, "check_size", unseen)
        try:
            newest = Checkpoints(path, warn=warned.append).newest_intact()
        except UserError as error:
            return {"error": str(error), "warned": warned}
    return {"step": newest and newest.step, "warned": warned, "read": sorted(read)}
