"""Safetensors files under the names that every reader knows, one or several with an index."""

import json
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
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write the tensors; at most one file of them is in memory beside the model.

    Args:
        folder: exists.
        tensors: plait's state dict, fp32 on the CPU.
        dtype: on disk, of all but the tensors that stay fp32.
        shard_bytes: a file holds no more, unless a single tensor does.

    Raises:
        OSError: the disk refused.
    """
    dtypes = {entry.name: torch.float32 if is_exact(entry.parts[0].name) else dtype for entry in entries}
    sizes = {entry.name: _numel(entry) * dtypes[entry.name].itemsize for entry in entries}
    shards = _fill(entries, sizes, shard_bytes)
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        # Copies, since one matrix may be written under two names.
        data = {entry.name: join(entry, tensors).to(dtypes[entry.name], copy=True) for entry in shard}
        save_file(data, folder / file, metadata={"format": "pt"})
        # The library makes it for its owner alone.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        place |= dict.fromkeys(data, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _fill(entries: Sequence[FileTensor], sizes: Mapping[str, int], limit: int) -> list[list[FileTensor]]:
    """The entries in their order, a new shard wherever the next one would exceed the limit."""
    shards: list[list[FileTensor]] = []
    room = 0
    for entry in entries:
        if not shards or sizes[entry.name] > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= sizes[entry.name]
    return shards


def _numel(entry: FileTensor) -> int:
    return torch.Size(entry.shape).numel()
