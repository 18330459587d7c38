"""Parameters sharded over dp_shard x sp (FSDP2), copies kept alike over dp_replicate (HSDP).

An expert's parameters are sharded over the ranks that hold the same experts, `efsdp`.

A unit is gathered when its layer needs it and its gradient is summed and cut when its layer is done.
Every reduction is a sum: the loss is divided by global counts before the backward.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from .collectives import gather_into, launch, scatter_into
from .mesh import Axis, Mesh
from .placements import expert_dim, local
from .waits import StreamWaits

__all__ = ["Unit", "reshard", "set_last_micro_batch", "shard_parameters"]


@dataclass(frozen=True)
class Unit:
    """Modules whose parameters are gathered and reduced together, those of inner units left out."""

    modules: Sequence[nn.Module]
    """The last of them to compute in a forward is the first in the backward."""
    dtype: torch.dtype | None = None
    """Of the gathered parameters; None is that of storage."""
    layer: int | None = None
    """For the ledger."""
    stays: bool = False
    """Whether the parameters stay gathered between the forward and the backward."""
    in_backward: bool = True
    """Whether the backward reads the parameters."""
    experts: bool = False
    """Whether the parameters are experts'."""


def shard_parameters(units: Sequence[Unit], mesh: Mesh) -> None:
    """Shard the parameters of a model.

    Args:
        units: inner ones first, the whole model last.
    """
    replicate = mesh.sizes["dp_replicate"] > 1
    whole_here: set[nn.Parameter] = set()
    for unit in units:
        name = "efsdp" if unit.experts else "fsdp"
        axis = mesh.axes[name]
        if axis.size == 1 and not replicate:
            whole_here.update(p for module in unit.modules for p in module.parameters())
            continue
        whole = mesh.expert_mesh if unit.experts else mesh.device_mesh
        assert whole is not None
        policy = MixedPrecisionPolicy(
            param_dtype=unit.dtype,
            reduce_dtype=torch.float32 if unit.dtype is not None else None,
            cast_forward_inputs=False,
        )
        modules = list(unit.modules)
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=whole[("dp_replicate", name)] if replicate else whole[name],
            mp_policy=policy,
            reshard_after_forward=not unit.stays,
            ignored_params=whole_here,
            shard_placement_fn=_expert_placement(axis.size) if unit.experts else None,
        )
        sharded = modules[0]
        assert isinstance(sharded, FSDPModule)
        sharded.set_unshard_in_backward(unit.in_backward)
        # Sums, not means; gloo has no scaled sum, hence the second line.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        # torch's interfaces for these are private; what they ask for is public.
        gather: Any = _AllGather(axis, unit.layer)
        scatter = _ReduceScatter(axis, unit.layer)
        sharded.set_custom_all_gather(gather)
        sharded.set_custom_reduce_scatter(cast(Any, scatter))
        if replicate:
            sharded.set_all_reduce_hook(_record_all_reduce(mesh.axes["dp_replicate"], scatter, unit.layer))
        if isinstance(mesh.waits, StreamWaits):
            _count_stream_waits(sharded, mesh.waits)


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Say whether the next backward ends the step: gradients are reduced then, and only then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward without a backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _expert_placement(ranks: int) -> Callable[[nn.Parameter], Shard]:
    return lambda parameter: Shard(expert_dim(local(parameter).shape, ranks))


class _Recorded:
    """FSDP's own collective, by the call that all of plait's go through."""

    def __init__(self, axis: Axis, layer: int | None) -> None:
        self._axis, self._layer = axis, layer
        self.last = 0.0
        """When it did something for the last time, by `time.perf_counter`."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.last = time.perf_counter()
        return torch.empty(*size, dtype=dtype, device=device)

    def _start(self, kind: str, sent: int, work: Any) -> Any:
        started = launch(self._axis, kind, sent, lambda: [self._axis.waits.during(work)], self._layer)
        self.last = time.perf_counter()
        return started


class _AllGather(_Recorded):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        sent = (group.size() - 1) * input_tensor.nbytes
        work = self._start(
            "fsdp_all_gather",
            sent,
            lambda: gather_into(output_tensor, input_tensor, group=group, async_op=async_op),
        )
        return work if async_op else None


class _ReduceScatter(_Recorded):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        sent = (group.size() - 1) * output_tensor.nbytes
        work = self._start(
            "fsdp_reduce_scatter",
            sent,
            lambda: scatter_into(output_tensor, input_tensor, op=op, group=group, async_op=async_op),
        )
        return work if async_op else None


def _record_all_reduce(axis: Axis, before: _ReduceScatter, layer: int | None) -> Callable[[Tensor], None]:
    """HSDP sums over the copies by itself, after the shards' sum; this notes it, when it is done."""

    def record(total: Tensor) -> None:
        axis.waits.since(before.last)
        if axis.ledger is not None:
            sent = 2 * (axis.size - 1) * total.nbytes // axis.size
            axis.ledger.wait(axis.ledger.launch(axis.name, "fsdp_all_reduce", sent, layer, "backward"))

    return record


def _count_stream_waits(sharded: FSDPModule, waits: StreamWaits) -> None:
    """Count where FSDP makes the computing stream wait for its own: before a unit computes, and at the end
    of the backward."""
    # Private, and the only places that know.
    group: Any = sharded._get_fsdp_state()._fsdp_param_group  # pyright: ignore
    for name in ("wait_for_unshard", "finalize_backward"):
        setattr(group, name, _counted(getattr(group, name), waits))


def _counted(method: Callable[[], None], waits: StreamWaits) -> Callable[[], None]:
    def counted() -> None:
        with waits:
            method()

    return counted
