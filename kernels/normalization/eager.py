"""The norms in torch operators: blocks of tokens, and the backward by hand.

The plain norm is the gated one without a gate, in one group. With ``r = 1 / sqrt(mean(h²) + eps)`` of a
group, of which the backward keeps only r:

    y = h·r·w        dh = dy·w·r − h·r²·mean(dy·w·r·h)        dw = Σ_t dy·r·h
"""

# T tokens, S tokens of a block, G groups, D channels of a group (elsewhere: the width)

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache_blocks import block_rows

__all__ = ["backward", "forward"]


def forward(
    x: Tensor, z: Tensor | None, weight_D: Tensor, eps: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    """The output, shaped and typed as x but contiguous, and ``r (T, G, 1)`` in the dtype of the sums."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_TGD = _grouped(x, num_groups)
    z_TGD = None if z is None else _grouped(z, num_groups)
    w_GD = weight_D.reshape(num_groups, -1).to(dtype)
    y = x.new_empty(x.shape)
    y_TGD = y.view(x_TGD.shape)
    r_TG1 = x.new_empty(*x_TGD.shape[:2], 1, dtype=dtype)
    for rows in _blocks(x_TGD):
        h_SGD = x_TGD[rows].to(dtype)
        if z_TGD is not None:
            h_SGD = F.silu(z_TGD[rows].to(dtype)).mul_(h_SGD)
        r_SG1 = r_TG1[rows]
        torch.linalg.vector_norm(h_SGD, dim=-1, keepdim=True, out=r_SG1)
        r_SG1.square_().div_(h_SGD.shape[-1]).add_(eps).rsqrt_()
        if y.dtype == dtype:
            torch.mul(h_SGD, r_SG1, out=y_TGD[rows]).mul_(w_GD)
        else:
            y_TGD[rows] = h_SGD.mul_(r_SG1).mul_(w_GD)
    return y, r_TG1


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight_D: Tensor, r_TG1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, z and weight, each in its own dtype; without a gate z's is empty."""
    num_groups, dtype = r_TG1.shape[1], r_TG1.dtype
    dy_TGD, x_TGD = _grouped(dy, num_groups), _grouped(x, num_groups)
    w_GD = weight_D.reshape(num_groups, -1).to(dtype)
    dw_GD = torch.zeros_like(w_GD)
    dx = x.new_empty(x.shape)
    dx_TGD = dx.view(x_TGD.shape)
    if z is None:
        for rows in _blocks(x_TGD):
            dh_SGD = _backward_of_block(dy_TGD[rows], x_TGD[rows].to(dtype), w_GD, r_TG1[rows], dw_GD)
            dx_TGD[rows] = dh_SGD
        return dx, x.new_empty(0), dw_GD.view(-1).to(weight_D.dtype)
    dz = z.new_empty(z.shape)
    z_TGD, dz_TGD = _grouped(z, num_groups), dz.view(x_TGD.shape)
    for rows in _blocks(x_TGD):
        x_SGD, z_SGD = x_TGD[rows].to(dtype), z_TGD[rows].to(dtype)
        gate_SGD = F.silu(z_SGD)
        dh_SGD = _backward_of_block(dy_TGD[rows], x_SGD * gate_SGD, w_GD, r_TG1[rows], dw_GD)
        dx_TGD[rows] = gate_SGD.mul_(dh_SGD)
        dz_TGD[rows] = torch.ops.aten.silu_backward(dh_SGD.mul_(x_SGD), z_SGD)
    return dx, dz, dw_GD.view(-1).to(weight_D.dtype)


def _backward_of_block(dy_SGD: Tensor, h_SGD: Tensor, w_GD: Tensor, r_SG1: Tensor, dw_GD: Tensor) -> Tensor:
    """The gradient of h; adds the block's share to ``dw_GD``."""
    dh_SGD = dy_SGD.to(r_SG1.dtype) * r_SG1
    product_SGD = dh_SGD * h_SGD
    dw_GD += product_SGD.sum(0)
    mean_SG1 = product_SGD.mul_(w_GD).mean(-1, keepdim=True)
    return dh_SGD.mul_(w_GD).addcmul_(h_SGD, mean_SG1.mul_(r_SG1).mul_(r_SG1), value=-1)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    return x.reshape(-1, num_groups, x.shape[-1] // num_groups)


def _blocks(x_TGD: Tensor) -> Iterator[slice]:
    T, G, D = x_TGD.shape
    rows = block_rows(T, G * D, x_TGD.device)
    return (slice(start, start + rows) for start in range(0, T, rows))
