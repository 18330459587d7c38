"""What calls the kernels: shapes, strides, the grid, and the second stage of the sums."""

# B batch, L length, C channels, K taps (the halo has K-1 tokens), P programs along tokens and rows

from typing import Any

import torch
from torch import Tensor

from ...launching import launch, sizes_of
from . import kernels

__all__ = ["backward", "fits", "forward"]


def fits(weight_CK: Tensor) -> bool:
    """Whether the kernels know so many taps; others are left to torch."""
    return 2 <= weight_CK.shape[1] <= 4


def forward(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    halo_BKC: Tensor | None,
    document_ids_BL: Tensor | None,
    silu: bool,
) -> Tensor:
    """As :func:`..eager.forward`."""
    B, L, C = x_BLC.shape
    x_BLC = _channels_together(x_BLC)
    y_BLC = x_BLC.new_empty(B, L, C)
    sizes = sizes_of("convolution_forward", x_BLC.device, C=C)
    grid, options = _grid(B, L, C, sizes)
    tensors, strides, constants = _common(x_BLC, weight_CK, bias_C, halo_BKC, document_ids_BL, silu)
    arguments = *tensors, y_BLC, L, C, *strides
    launch(kernels.convolve, grid, *arguments, **constants, **options)
    return y_BLC


def backward(
    dy_BLC: Tensor,
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    halo_BKC: Tensor | None,
    document_ids_BL: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`..eager.backward`."""
    B, L, C = x_BLC.shape
    K = weight_CK.shape[1]
    x_BLC, dy_BLC = _channels_together(x_BLC), _channels_together(dy_BLC)
    dx_BLC = x_BLC.new_empty(B, L, C)
    dhalo_BKC = x_BLC.new_empty(0) if halo_BKC is None else halo_BKC.new_empty(halo_BKC.shape)
    sizes = sizes_of("convolution_backward", x_BLC.device, C=C)
    grid, options = _grid(B, L, C, sizes)
    dtaps_PKC = x_BLC.new_empty(B * grid[1], K + 1, C, dtype=torch.float32)
    tensors, strides, constants = _common(x_BLC, weight_CK, bias_C, halo_BKC, document_ids_BL, silu)
    launch(
        kernels.differentiate,
        grid,
        dy_BLC,
        *tensors,
        dx_BLC,
        x_BLC if halo_BKC is None else dhalo_BKC,
        dtaps_PKC,
        L,
        C,
        *dy_BLC.stride()[:2],
        *strides,
        **constants,
        **options,
    )
    dtaps_KC = dtaps_PKC.sum(0)
    dweight_CK = dtaps_KC[:K].t().to(weight_CK.dtype).contiguous()
    dbias_C = x_BLC.new_empty(0) if bias_C is None else dtaps_KC[K].to(bias_C.dtype)
    return dx_BLC, dweight_CK, dbias_C, dhalo_BKC


def _channels_together(x_BLC: Tensor) -> Tensor:
    return x_BLC if x_BLC.stride(2) == 1 or x_BLC.shape[2] == 1 else x_BLC.contiguous()


def _grid(B: int, L: int, C: int, sizes: dict[str, int]) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The programs, and what of the kernel the table decides."""
    span, block = sizes["span"], sizes["block"]
    options = {"SPAN": span, "BLOCK": block, "STAGES": sizes["num_stages"], "num_warps": sizes["num_warps"]}
    return (-(-C // block), -(-L // span), B), options


def _common(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    halo_BKC: Tensor | None,
    document_ids_BL: Tensor | None,
    silu: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The kernels' inputs, their strides and what is known of them; what is absent is not read."""
    halo_BKC = None if halo_BKC is None else _channels_together(halo_BKC)
    if document_ids_BL is not None and document_ids_BL.stride(1) != 1:
        document_ids_BL = document_ids_BL.contiguous()
    constants = {
        "K": weight_CK.shape[1],
        "HAS_BIAS": bias_C is not None,
        "HAS_HALO": halo_BKC is not None,
        "HAS_IDS": document_ids_BL is not None,
        "SILU": silu,
    }
    tensors = (
        x_BLC,
        weight_CK,
        x_BLC if bias_C is None else bias_C.contiguous(),
        x_BLC if halo_BKC is None else halo_BKC,
        x_BLC if document_ids_BL is None else document_ids_BL,
    )
    strides = (
        *x_BLC.stride()[:2],
        *((0, 0) if halo_BKC is None else halo_BKC.stride()[:2]),
        *weight_CK.stride(),
        0 if document_ids_BL is None else document_ids_BL.stride(0),
    )
    return tensors, strides, constants
