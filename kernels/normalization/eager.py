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

__all__ = [
    "add_backward",
    "add_forward",
    "add_up_products",
    "backward",
    "blocks",
    "forward",
    "gated",
    "gradient_of_h",
    "make_reciprocals",
    "sum_squares",
    "write_gated_gradients",
    "write_output",
]


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
    for rows in blocks(x_TGD):
        h_SGD = x_TGD[rows].to(dtype) if z_TGD is None else gated(x_TGD[rows], z_TGD[rows], dtype)
        r_SG1 = r_TG1[rows]
        sum_squares(h_SGD, r_SG1)
        make_reciprocals(r_SG1, h_SGD.shape[-1], eps)
        write_output(y_TGD[rows], h_SGD, r_SG1, w_GD)
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
        for rows in blocks(x_TGD):
            h_SGD = x_TGD[rows].to(dtype)
            dh_SGD, dot_SG1 = add_up_products(dy_TGD[rows], h_SGD, w_GD, r_TG1[rows], dw_GD)
            dx_TGD[rows] = gradient_of_h(dh_SGD, h_SGD, w_GD, r_TG1[rows], dot_SG1.div_(h_SGD.shape[-1]))
        return dx, x.new_empty(0), dw_GD.view(-1).to(weight_D.dtype)
    dz = z.new_empty(z.shape)
    z_TGD, dz_TGD = _grouped(z, num_groups), dz.view(x_TGD.shape)
    for rows in blocks(x_TGD):
        x_SGD, z_SGD = x_TGD[rows].to(dtype), z_TGD[rows].to(dtype)
        gate_SGD = F.silu(z_SGD)
        h_SGD = x_SGD * gate_SGD
        dh_SGD, dot_SG1 = add_up_products(dy_TGD[rows], h_SGD, w_GD, r_TG1[rows], dw_GD)
        gradient_of_h(dh_SGD, h_SGD, w_GD, r_TG1[rows], dot_SG1.div_(h_SGD.shape[-1]))
        write_gated_gradients(dx_TGD[rows], dz_TGD[rows], dh_SGD, x_SGD, z_SGD, gate_SGD)
    return dx, dz, dw_GD.view(-1).to(weight_D.dtype)


def add_forward(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x + y``, its norm, and r."""
    total = torch.add(x, y)
    return total, *forward(total, None, weight_D, eps, 1)


def add_backward(
    dtotal: Tensor | None, dy: Tensor, total: Tensor, weight_D: Tensor, r_T11: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of either summand and of weight; the sum's own may be None."""
    dx, _, dweight_D = backward(dy, total, None, weight_D, r_T11)
    return dx if dtotal is None else dx.add_(dtotal), dweight_D


def gated(x_SGD: Tensor, z_SGD: Tensor, dtype: torch.dtype) -> Tensor:
    """``h = x·silu(z)`` in the dtype of the sums."""
    return F.silu(z_SGD.to(dtype)).mul_(x_SGD.to(dtype))


def sum_squares(h_SGD: Tensor, squares_SG1: Tensor) -> None:
    """Put ``Σ_d h²`` into ``squares_SG1``."""
    torch.linalg.vector_norm(h_SGD, dim=-1, keepdim=True, out=squares_SG1)
    squares_SG1.square_()


def make_reciprocals(squares: Tensor, width: int, eps: float) -> None:
    """Turn the sums of squares into r, in place."""
    squares.div_(width).add_(eps).rsqrt_()


def write_output(y_SGD: Tensor, h_SGD: Tensor, r_SG1: Tensor, w_GD: Tensor) -> None:
    """Put ``h·r·w`` into y, rounded once; h may be overwritten where y has another dtype."""
    if y_SGD.dtype == h_SGD.dtype:
        torch.mul(h_SGD, r_SG1, out=y_SGD).mul_(w_GD)
    else:
        y_SGD.copy_(h_SGD.mul_(r_SG1).mul_(w_GD))


def add_up_products(
    dy_SGD: Tensor, h_SGD: Tensor, w_GD: Tensor, r_SG1: Tensor, dw_GD: Tensor
) -> tuple[Tensor, Tensor]:
    """``dy·r`` and ``Σ_d dy·w·r·h``; adds the block's share to ``dw_GD``."""
    dyr_SGD = dy_SGD.to(r_SG1.dtype) * r_SG1
    product_SGD = dyr_SGD * h_SGD
    dw_GD += product_SGD.sum(0)
    return dyr_SGD, product_SGD.mul_(w_GD).sum(-1, keepdim=True)


def gradient_of_h(dyr_SGD: Tensor, h_SGD: Tensor, w_GD: Tensor, r_SG1: Tensor, mean_SG1: Tensor) -> Tensor:
    """The gradient of h in the place of ``dy·r``; overwrites the mean of ``dy·w·r·h``."""
    return dyr_SGD.mul_(w_GD).addcmul_(h_SGD, mean_SG1.mul_(r_SG1).mul_(r_SG1), value=-1)


def write_gated_gradients(
    dx_SGD: Tensor, dz_SGD: Tensor, dh_SGD: Tensor, x_SGD: Tensor, z_SGD: Tensor, gate_SGD: Tensor
) -> None:
    """From the gradient of ``h = x·gate``, which it overwrites along with the gate ``silu(z)``."""
    dx_SGD.copy_(gate_SGD.mul_(dh_SGD))
    dz_SGD.copy_(torch.ops.aten.silu_backward(dh_SGD.mul_(x_SGD), z_SGD))


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    return x.reshape(-1, num_groups, x.shape[-1] // num_groups)


def blocks(x_TGD: Tensor) -> Iterator[slice]:
    """The blocks of tokens to work on one after another."""
    T, G, D = x_TGD.shape
    rows = block_rows(T, G * D, x_TGD.device)
    return (slice(start, start + rows) for start in range(0, T, rows))
