"""Safetensors files under the names that every reader knows, one or several with an index."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model import EXACT_PARAMETERS
from .names import FileTensor, join

__all__ = ["is_exact", "write_shards"]

EXACT = (*EXACT_PARAMETERS, "router.correction_bias")


def is_exact(name: str) -> bool:
    """Whether one of plait's tensors keeps fp32 whatever the files' dtype."""
    return name.endswith(EXACT)


def write_shards(
    folder: Path,
    entries: Sequence[FileTensor],
    tensors: Mapping[str, Tensor],
    *,
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
    carried: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the tensors; at most one file of them is in memory beside the model.

    Args:
        folder: exists.
        tensors: plait's state dict, fp32 on the CPU.
        dtypes: of each entry on disk, by its name.
        shard_bytes: a file holds no more, unless a single tensor does.
        carried: more tensors, written after the entries as they are.

    Raises:
        OSError: the disk refused.
    """
    carried = carried or {}
    sizes = {entry.name: math.prod(entry.shape) * dtypes[entry.name].itemsize for entry in entries}
    sizes |= {name: tensor.nbytes for name, tensor in carried.items()}
    by_name = {entry.name: entry for entry in entries}
    shards = _fill(sizes, shard_bytes)
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        # Copies, since one matrix may be written under two names.
        data = {
            name: carried[name].contiguous()
            if name in carried
            else join(by_name[name], tensors).to(dtypes[name], copy=True)
            for name in shard
        }
        save_file(data, folder / file, metadata={"format": "pt"})
        # The library makes it for its owner alone.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        place |= dict.fromkeys(data, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _fill(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in their order, a new shard wherever the next tensor would exceed the limit."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
