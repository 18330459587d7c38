"""The passes around a shared group's exchanges in torch operators; each makes h again rather than keep it."""

# T tokens, S tokens of a block, D channels of the group on this rank; the group's dim of eager.py is one

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager

__all__ = ["dot_products", "gradients", "output", "squares"]


def squares(x: Tensor, z: Tensor) -> Tensor:
    """``Σ_d h²`` (T, 1, 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_T1D, z_T1D = _one_group(x), _one_group(z)
    squares_T11 = x.new_empty(len(x_T1D), 1, 1, dtype=dtype)
    for rows in eager.blocks(x_T1D):
        eager.sum_squares(eager.gated(x_T1D[rows], z_T1D[rows], dtype), squares_T11[rows])
    return squares_T11


def output(x: Tensor, z: Tensor, weight_D: Tensor, r_T11: Tensor) -> Tensor:
    """``h·r·w``, shaped and typed as x."""
    x_T1D, z_T1D, w_1D = _one_group(x), _one_group(z), weight_D.to(r_T11.dtype)[None]
    y = x.new_empty(x.shape)
    y_T1D = y.view(x_T1D.shape)
    for rows in eager.blocks(x_T1D):
        h_S1D = eager.gated(x_T1D[rows], z_T1D[rows], r_T11.dtype)
        eager.write_output(y_T1D[rows], h_S1D, r_T11[rows], w_1D)
    return y


def dot_products(dy: Tensor, x: Tensor, z: Tensor, weight_D: Tensor, r_T11: Tensor) -> Tensor:
    """``Σ_d dy·w·r·h`` (T, 1, 1)."""
    dy_T1D, x_T1D, z_T1D = _one_group(dy), _one_group(x), _one_group(z)
    w_1D = weight_D.to(r_T11.dtype)[None]
    dot_T11 = torch.empty_like(r_T11)
    for rows in eager.blocks(x_T1D):
        h_S1D = eager.gated(x_T1D[rows], z_T1D[rows], r_T11.dtype)
        dyr_S1D = dy_T1D[rows].to(r_T11.dtype) * r_T11[rows]
        dot_T11[rows] = dyr_S1D.mul_(h_S1D).mul_(w_1D).sum(-1, keepdim=True)
    return dot_T11


def gradients(
    dy: Tensor, x: Tensor, z: Tensor, weight_D: Tensor, r_T11: Tensor, mean_T11: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, z and weight, from the mean of ``dy·w·r·h`` over the whole group."""
    dtype = r_T11.dtype
    dy_T1D, x_T1D, z_T1D = _one_group(dy), _one_group(x), _one_group(z)
    w_1D = weight_D.to(dtype)[None]
    dw_1D = torch.zeros_like(w_1D)
    dx, dz = x.new_empty(x.shape), z.new_empty(z.shape)
    dx_T1D, dz_T1D = dx.view(x_T1D.shape), dz.view(x_T1D.shape)
    for rows in eager.blocks(x_T1D):
        x_S1D, z_S1D, r_S11 = x_T1D[rows].to(dtype), z_T1D[rows].to(dtype), r_T11[rows]
        gate_S1D = F.silu(z_S1D)
        h_S1D = x_S1D * gate_S1D
        dyr_S1D = dy_T1D[rows].to(dtype) * r_S11
        dw_1D += (dyr_S1D * h_S1D).sum(0)
        dh_S1D = eager.gradient_of_h(dyr_S1D, h_S1D, w_1D, r_S11, mean_T11[rows])
        eager.write_gated_gradients(dx_T1D[rows], dz_T1D[rows], dh_S1D, x_S1D, z_S1D, gate_S1D)
    return dx, dz, dw_1D[0].to(weight_D.dtype)


def _one_group(x: Tensor) -> Tensor:
    """(…, D) -> (T, 1, D)."""
    return x.reshape(-1, 1, x.shape[-1])
