"""What is known of a batch's documents before it reaches the device."""

import numpy as np
import pytest
import torch

from plait.parallel.mesh import Mesh
from plait.pretrain.micro_batches import cut_batch


@pytest.mark.parametrize(
    ("ids", "most"),
    [
        ([[0, 0, 0, 0, 0]], (2, 8)),
        ([[0, 1, 2, 3, 4]], (8, 1)),
        ([[0, 0, 0, 1, 1], [0, 1, 1, 2, 2]], (4, 4)),
        ([[0, 0, 0, 0, 1], [1, 1, 1, 1, 2]], (4, 4)),
    ],
)
def test_documents_are_bounded(ids: list[list[int]], most: tuple[int, int]) -> None:
    document_ids = np.array(ids, np.int32)
    arrays = {name: np.zeros((len(ids), 5), np.int64) for name in ("tokens", "targets", "positions")}
    (micro,) = cut_batch(
        arrays | {"document_ids": document_ids},
        Mesh.single(),
        length=5,
        rows=len(ids),
        size=None,
        device=torch.device("cpu"),
        isolate_documents=True,
    )
    assert micro.packing.most == most
