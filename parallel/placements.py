"""Which part of a parameter a rank holds: cut over `tp` along one dim, or the same on its every rank; an
expert's is cut over `ep`.

Parameters are DTensors for what they are (storage, checkpoint, optimizer); the mathematics takes
`local` tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from .collectives import sum_in_place
from .mesh import Mesh

__all__ = [
    "Split",
    "expert_dim",
    "gradient_norm",
    "local",
    "part",
    "place_parameters",
    "scale_gradients",
    "shard_range",
    "sum_replicated_gradients",
]


class Split(NamedTuple):
    """How the ranks of an axis hold a parameter."""

    axis: Literal["tp", "ep"]
    dim: int | None
    """The dim that is cut; None where each rank holds the whole."""


def shard_range(size: int, ranks: int, place: int) -> tuple[int, int]:
    """First and end of a rank's part of a dim, by torch's rule: the last may be shorter, or empty."""
    step = -(-size // ranks)
    return min(size, place * step), min(size, (place + 1) * step)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as an ordinary one; the gradient is this rank's own contribution."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole tensor; an empty part lies at the end of the dim it lacks."""
    box = [slice(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tuple(box)
    mesh = tensor.device_mesh
    places = mesh.get_coordinate()
    assert places is not None
    cuts = list(zip(tensor.placements, mesh.shape, places, strict=True))
    # FSDP cuts last what tp or ep has cut before, though its axis is the outer one.
    for placement, ranks, place in sorted(cuts, key=lambda cut: isinstance(cut[0], _StridedShard)):
        if isinstance(placement, Shard | _StridedShard):
            held = box[placement.dim]
            first, end = shard_range(held.stop - held.start, ranks, place)
            empty = first == end
            whole = tensor.shape[placement.dim]
            box[placement.dim] = slice(whole, whole) if empty else slice(held.start + first, held.start + end)
    return tuple(box)


def place_parameters(model: nn.Module, splits: Mapping[str, Split], mesh: Mesh) -> None:
    """Turn a model's parameters, on the meta device, into this rank's parts over `tp` or `ep`.

    Args:
        splits: by the parameters' names.
    """
    for name, parameter in list(model.named_parameters()):
        axis, dim = splits[name]
        along = mesh.axes[axis]
        if along.size == 1:
            continue
        over = mesh.expert_mesh if axis == "ep" else mesh.device_mesh
        assert over is not None
        whole = parameter.detach()
        placement = Replicate() if dim is None else Shard(dim)
        piece = whole
        if dim is not None:
            first, end = shard_range(whole.shape[dim], along.size, along.place)
            piece = whole.narrow(dim, first, end - first).contiguous()
        placed = DTensor.from_local(
            piece, over[axis], [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(placed))


def expert_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim of an expert parameter (e, out, in) that `efsdp` cuts: the first that it divides.

    Where it divides none it is the first, of which some ranks have less, or nothing.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has a gradient, and this rank's part of it."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter, local(parameter.grad)


def _is_replicated(parameter: Tensor) -> bool:
    """Whether each rank of `tp` holds the same part, and so has its share of the same gradient."""
    if not isinstance(parameter, DTensor):
        return True
    names = parameter.device_mesh.mesh_dim_names or ()
    if "ep" in names or "efsdp" in names:
        return False
    return "tp" not in names or isinstance(parameter.placements[names.index("tp")], Replicate)


@torch.no_grad()
def sum_replicated_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Complete the gradients of the parameters that every rank of `tp` holds.

    Each rank saw only its own tokens or heads, so that its gradient is its share of a sum. They travel
    together, after FSDP has summed and cut them.
    """
    if mesh.tp.size == 1:
        return
    shares = [grad for parameter, grad in _gradients(parameters) if _is_replicated(parameter)]
    for dtype in {grad.dtype for grad in shares}:
        same = [grad for grad in shares if grad.dtype == dtype]
        flat = sum_in_place(torch.cat([grad.flatten() for grad in same]), mesh.tp)
        for grad, total in zip(same, flat.split([grad.numel() for grad in same]), strict=True):
            grad.copy_(total.view_as(grad))


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The 2-norm of the whole gradient, the same on every rank; each element counts once.

    Every element lies on one rank of dp_shard x sp x tp, whichever way these divide it among them; only
    what tp holds several times is counted on the first.
    """
    counted = [
        grad
        for parameter, grad in _gradients(parameters)
        if mesh.tp.place == 0 or not _is_replicated(parameter)
    ]
    norm = torch.nn.utils.get_total_norm(counted)
    if mesh.world_size == 1:
        return norm
    return sum_in_place(norm.to(torch.float64).square(), mesh.axes["replica"]).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a number."""
    for _, grad in _gradients(parameters):
        grad.mul_(factor.to(grad.device, grad.dtype))
