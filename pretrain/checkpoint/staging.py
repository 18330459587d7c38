"""This rank's parts of the tensors to be saved: as they are, or copied so that training may go on."""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .index import DTYPES

__all__ = ["Staging", "local_part"]


def local_part(name: str, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, after a check that raw bytes can hold it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"checkpoint item {name!r} is of type {type(tensor).__name__}, no tensor; put it in the facts"
        )
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    if local.layout != torch.strided or local.device.type == "meta" or local.dtype not in DTYPES.values():
        raise TypeError(
            f"checkpoint item {name!r} is {local.dtype}, {local.layout}, on {local.device}; "
            f"it must be dense, hold data and have a dtype of {', '.join(DTYPES)}"
        )
    return local


class Staging:
    """CPU memory that tensors are copied to; kept, since pinning it and touching it first is slow."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take and touch the memory that `copy` of such tensors needs."""
        # Where there is not so much, the save itself says so.
        with suppress(RuntimeError, MemoryError):
            for name, tensor in tensors.items():
                self._buffers[name] = _buffer(tensor).zero_()

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers, devices = {}, set()
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = _buffer(tensor)
            buffers[name] = buffer.copy_(tensor, non_blocking=True)
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return buffers


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
