"""Which part of a parameter a rank holds: cut over `tp` along one dim, or the same on its every rank.

Parameters are DTensors for what they are (storage, checkpoint, optimizer); the mathematics takes
`local` tensors.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .collectives import sum_in_place
from .mesh import Mesh

__all__ = [
    "gradient_norm",
    "local",
    "part",
    "place_parameters",
    "scale_gradients",
    "shard_range",
    "sum_replicated_gradients",
]


def shard_range(size: int, ranks: int, place: int) -> tuple[int, int]:
    """First and end of a rank's part of a dim, by torch's rule: the last may be shorter, or empty."""
    step = -(-size // ranks)
    return min(size, place * step), min(size, (place + 1) * step)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as an ordinary one; the gradient is this rank's own contribution."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


def place_parameters(model: nn.Module, dims: Mapping[str, int | None], mesh: Mesh) -> None:
    """Turn a model's parameters, on the meta device, into this rank's parts over `tp`.

    Args:
        dims: a parameter's name -> the dim that `tp` cuts, None for one that each rank holds whole.
    """
    if mesh.tp.size == 1:
        return
    assert mesh.device_mesh is not None
    tp = mesh.device_mesh["tp"]
    for name, parameter in list(model.named_parameters()):
        dim = dims[name]
        whole = parameter.detach()
        placement = Replicate() if dim is None else Shard(dim)
        piece = whole
        if dim is not None:
            first, end = shard_range(whole.shape[dim], mesh.tp.size, mesh.tp.place)
            piece = whole.narrow(dim, first, end - first).contiguous()
        placed = DTensor.from_local(
            piece, tp, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(placed))


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has a gradient, and this rank's part of it."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter, local(parameter.grad)


def _is_replicated(parameter: Tensor) -> bool:
    """Whether each rank of `tp` holds the same part."""
    if not isinstance(parameter, DTensor):
        return True
    names = parameter.device_mesh.mesh_dim_names or ()
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
    """The 2-norm of the whole gradient, the same on every rank; each element counts once."""
    counted = [
        grad
        for parameter, grad in _gradients(parameters)
        if mesh.tp.place == 0 or not _is_replicated(parameter)
    ]
    norm = torch.nn.utils.get_total_norm(counted)
    if mesh.world_size == 1:
        return norm
    square = norm.to(torch.float64).square()
    for axis in ("fsdp", "tp"):
        sum_in_place(square, mesh.axes[axis])
    return square.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a number."""
    for _, grad in _gradients(parameters):
        grad.mul_(factor.to(grad.device, grad.dtype))
