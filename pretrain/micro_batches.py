"""A batch's arrays on this rank become micro-batches: padded where ranks do not divide it, and told apart.

Every rank makes as many micro-batches as the fullest, since what it computes in one it exchanges with
the others in the same one. A rank that has run out of sequences computes one of padding.

Shapes: B sequences, P real tokens of this shard, L tokens with their padding, S of all shards.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.window import IGNORE
from ..parallel.mesh import Mesh
from .loss import MicroBatch
from .model import Cut, Packing

__all__ = ["Arrays", "cut_batch"]

Arrays = dict[str, np.ndarray]


def cut_batch(
    arrays: Arrays,
    mesh: Mesh,
    *,
    length: int,
    rows: int,
    size: int | None,
    device: torch.device,
    isolate_documents: bool,
) -> list[MicroBatch]:
    """The micro-batches of this rank.

    Args:
        arrays: as `plait.data.window.batch` makes them of this rank's sequences and part of the window.
        length: tokens of a whole window.
        rows: sequences of the rank that has most.
        size: sequences a micro-batch; None puts all of them into one.
    """
    size = min(size or rows, rows)
    padding = mesh.shard_length(length) * mesh.sp.size - length
    most = _most(arrays["document_ids"], padding) if isolate_documents else (0, 0)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return [
        _cut(
            {name: tensor[first : first + size] for name, tensor in tensors.items()},
            mesh,
            length,
            isolate_documents,
            most,
        )
        for first in range(0, rows, size)
    ]


def _most(document_ids: np.ndarray, padding: int) -> tuple[int, int]:
    """Documents of a row and tokens of a document, at most, with that of padding which may follow.

    They are powers of two, so that what is compiled for them is compiled a few times only.
    """
    rows, length = document_ids.shape
    if rows == 0:
        return 0, 0
    # Each row's first token begins a document too, and what is after the last row begins none.
    begins = np.ones((rows, length), bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    most = int(begins.sum(1).max()) + 1
    longest = max(padding, int(np.diff(np.flatnonzero(begins), append=rows * length).max()))
    return 1 << (most - 1).bit_length(), 1 << (longest - 1).bit_length()


def _cut(
    tensors: dict[str, Tensor], mesh: Mesh, length: int, isolate_documents: bool, most: tuple[int, int]
) -> MicroBatch:
    real_rows, real = tensors["tokens"].shape
    shard = mesh.shard_length(length)
    if real_rows == 0:
        tensors = {name: F.pad(tensor, (0, 0, 0, 1)) for name, tensor in tensors.items()}
        tensors["targets"] = torch.full_like(tensors["targets"], IGNORE)
        most = 0, 0
    tokens_BL = F.pad(tensors["tokens"], (0, shard - real))
    targets_BL = F.pad(tensors["targets"], (0, shard - real), value=IGNORE)
    positions_BL = F.pad(tensors["positions"], (0, shard - real))
    ids_BL = whole_BS = None
    if isolate_documents:
        ids = tensors["document_ids"]
        whole_BS = torch.cat([ids, (ids[:, -1:] + 1).expand(-1, shard * mesh.sp.size - length)], dim=1)
        first = mesh.tokens(length)[0]
        before_B1 = whole_BS[:, max(0, first - 1), None]
        ids_BL = whole_BS[:, first : first + shard] - before_B1
        if mesh.sp.size == 1:
            whole_BS = None
    whole = mesh.size("tokens") == 1 and real_rows > 0
    cut = None if whole else Cut(rows=real_rows, tokens=real, length=length)
    return MicroBatch(tokens_BL, targets_BL, Packing(positions_BL, ids_BL, whole_BS, cut, most))
