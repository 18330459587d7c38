"""Which box of each tensor this rank writes and reads: `plait.parallel.placements` says, not the DTensor.

torch reckons the offset of a dim that is cut twice, over tp and then over FSDP's ranks, as if the parts
were even; a vocabulary that tp does not divide would be written over itself.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...parallel.placements import part

__all__ = ["PartLoadPlanner", "PartSavePlanner"]


class PartSavePlanner(DefaultSavePlanner):
    """Plans by the tensors of all ranks, and takes the bytes from this rank's parts, staged or live."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local = local

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[self._placed(item) for item in plan.items])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._local[write_item.index.fqn]

    def _placed(self, item: WriteItem) -> WriteItem:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        chunk = _chunk(self.state_dict[name])
        return dataclasses.replace(
            item,
            index=MetadataIndex(name, chunk.offsets),
            tensor_data=dataclasses.replace(data, chunk=chunk),
        )


class PartLoadPlanner(DefaultLoadPlanner):
    """Plans what this rank's parts need of tensors that are known to fit; rows never saved are not read."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        reads = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            reads += create_read_items_for_chunk_list(name, stored, [_chunk(tensor, stored.size)])
        return LoadPlan(reads)


def _chunk(tensor: Tensor, shape: torch.Size | None = None) -> ChunkStorageMetadata:
    """This rank's box of a tensor, within another shape where one is given."""
    box = part(tensor)
    if shape is not None:
        box = [slice(min(s.start, end), min(s.stop, end)) for s, end in zip(box, shape, strict=True)]
    return ChunkStorageMetadata(
        torch.Size([side.start for side in box]), torch.Size([side.stop - side.start for side in box])
    )
