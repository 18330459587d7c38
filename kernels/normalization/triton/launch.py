"""What calls the kernels: blocks of rows, and the second stage of the sums."""

# T tokens, G groups, D channels of a group (elsewhere: the width), P programs along the tokens

import torch
from torch import Tensor

from ...launching import launch, sizes_of
from . import kernels

__all__ = [
    "add_backward",
    "add_forward",
    "backward",
    "dot_products",
    "fits",
    "forward",
    "gradients",
    "output",
    "squares",
]

WIDEST = 1 << 14
"""Channels of a group that a program's registers hold; wider ones are torch's."""


def fits(x: Tensor, num_groups: int) -> bool:
    return 0 < x.shape[-1] // num_groups <= WIDEST and x.numel() > 0


def forward(
    x: Tensor, z: Tensor | None, weight_D: Tensor, eps: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    """As :func:`..eager.forward`."""
    tokens, D = x.numel() // x.shape[-1], x.shape[-1] // num_groups
    r_TG1 = x.new_empty(tokens, num_groups, 1, dtype=torch.float32)
    return _normalize(x, z, weight_D, r_TG1, eps, D, given=False), r_TG1


def add_forward(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`..eager.add_forward`."""
    D = x.shape[-1]
    r_T11 = x.new_empty(x.numel() // D, 1, 1, dtype=torch.float32)
    total = x.new_empty(x.shape)
    return total, _normalize(x, y, weight_D, r_T11, eps, D, given=False, total=total), r_T11


def add_backward(
    dtotal: Tensor | None, dy: Tensor, total: Tensor, weight_D: Tensor, r_T11: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`..eager.add_backward`."""
    dx, _, dweight_D = gradients(dy, total, None, weight_D, r_T11, None, dtotal)
    return dx, dweight_D


def output(x: Tensor, z: Tensor, weight_D: Tensor, r_T11: Tensor) -> Tensor:
    """``h·r·w`` of one group, of a given r."""
    return _normalize(x, z, weight_D, r_T11, 0.0, x.shape[-1], given=True)


def squares(x: Tensor, z: Tensor) -> Tensor:
    """``Σ_d h²`` (T, 1, 1) of one group."""
    x, z, D = x.contiguous(), z.contiguous(), x.shape[-1]
    squares_T11 = x.new_empty(x.numel() // D, 1, 1, dtype=torch.float32)
    grid, options = _rows(x, D)
    arguments = x, z, squares_T11, len(squares_T11), D
    launch(kernels.add_squares, grid, *arguments, **options)
    return squares_T11


def dot_products(dy: Tensor, x: Tensor, z: Tensor, weight_D: Tensor, r_T11: Tensor) -> Tensor:
    """``Σ_d dy·w·r·h`` (T, 1, 1) of one group."""
    dy, x, z, D = dy.contiguous(), x.contiguous(), z.contiguous(), x.shape[-1]
    products_T11 = torch.empty_like(r_T11)
    grid, options = _rows(x, D)
    arguments = dy, x, z, weight_D.contiguous(), r_T11, products_T11, len(r_T11), D
    launch(kernels.add_products, grid, *arguments, **options)
    return products_T11


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight_D: Tensor, r_TG1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`..eager.backward`."""
    return gradients(dy, x, z, weight_D, r_TG1, None)


def gradients(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight_D: Tensor,
    r_TG1: Tensor,
    mean_TG1: Tensor | None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`; the mean of ``dy·w·r·h`` may be given, and without a gate more of x's gradient."""
    dy, x = dy.contiguous(), x.contiguous()
    z = None if z is None else z.contiguous()
    T, G, _ = r_TG1.shape
    D = x.shape[-1] // G
    dx, dz = x.new_empty(x.shape), x.new_empty(0) if z is None else z.new_empty(z.shape)
    sizes = sizes_of("normalization_backward", x.device, D=D)
    block, rows = _block(D, sizes["elements"])
    # Whole blocks of rows a program, so that only the last has less to do.
    tokens = -(-T * G // (sizes["programs"] * rows)) * rows
    grid = -(-T // tokens), G
    dweight_PGD = x.new_empty(*grid, D, dtype=torch.float32)
    launch(
        kernels.differentiate,
        grid,
        dy,
        x,
        z if z is not None else x if more is None else more.contiguous(),
        weight_D.contiguous(),
        r_TG1,
        r_TG1 if mean_TG1 is None else mean_TG1.contiguous(),
        dx,
        dx if z is None else dz,
        dweight_PGD,
        T,
        G,
        D,
        tokens,
        num_warps=sizes["num_warps"],
        ROWS=rows,
        BLOCK=block,
        GATED=z is not None,
        ADDED=more is not None,
        GIVEN=mean_TG1 is not None,
    )
    return dx, dz, dweight_PGD.sum(0).view(-1).to(weight_D.dtype)


def _normalize(
    x: Tensor,
    z: Tensor | None,
    weight_D: Tensor,
    r_TG1: Tensor,
    eps: float,
    D: int,
    *,
    given: bool,
    total: Tensor | None = None,
) -> Tensor:
    """
    Args:
        total: takes ``x + z``; None where z is a gate.
    """
    x = x.contiguous()
    y = x.new_empty(x.shape)
    grid, options = _rows(x, D)
    launch(
        kernels.normalize,
        grid,
        x,
        x if z is None else z.contiguous(),
        weight_D.contiguous(),
        y,
        r_TG1,
        y if total is None else total,
        r_TG1.numel(),
        r_TG1.shape[1],
        D,
        eps,
        GATED=z is not None and total is None,
        ADDED=total is not None,
        GIVEN=given,
        **options,
    )
    return y


def _rows(x: Tensor, D: int) -> tuple[tuple[int], dict[str, int]]:
    """A grid over blocks of rows, with the blocks' sizes."""
    sizes = sizes_of("normalization_forward", x.device, D=D)
    block, rows = _block(D, sizes["elements"])
    options = {"ROWS": rows, "BLOCK": block, "num_warps": sizes["num_warps"]}
    return (-(-x.numel() // (D * rows)),), options


def _block(D: int, elements: int) -> tuple[int, int]:
    """The columns of a block, a power of two, and how many rows fit into so many elements."""
    block = 1 << (D - 1).bit_length()
    return block, max(1, elements // block)
