"""What calls the kernels."""

# T tokens, E experts, K experts a token, S = T K rows, D channels

import torch
import triton
from torch import Tensor

from ...launching import launch, sizes_of
from . import kernels

__all__ = ["choose", "combine", "combine_backward", "dispatch", "dispatch_backward"]


def choose(score_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, top_k_groups: int) -> Tensor:
    """As :func:`..eager.choose`; of equal ones the first."""
    (T, E), size = score_TE.shape, score_TE.shape[1] // num_groups
    expert_TK = score_TE.new_empty(T, top_k, dtype=torch.int64)
    groups, block = triton.next_power_of_2(num_groups), triton.next_power_of_2(size)
    if T:
        sizes = sizes_of("experts_choose", score_TE.device, E=E)
        rows = max(1, sizes["elements"] // (groups * block))
        launch(
            kernels.choose,
            (-(-T // rows),),
            score_TE.contiguous(),
            bias_E.contiguous(),
            expert_TK,
            T,
            num_groups,
            size,
            top_k,
            top_k_groups,
            num_warps=sizes["num_warps"],
            ROWS=rows,
            GROUPS=groups,
            BLOCK=block,
            GROUPED=top_k_groups < num_groups,
        )
    return expert_TK


def dispatch(x_TD: Tensor, inverse_TK: Tensor) -> Tensor:
    """As :func:`..eager.dispatch`."""
    (T, K), D = inverse_TK.shape, x_TD.shape[1]
    rows_SD = x_TD.new_empty(T * K, D)
    if rows_SD.numel():
        grid, options = _grid(x_TD)
        tensors = x_TD.contiguous(), inverse_TK.contiguous(), rows_SD
        launch(kernels.scatter, grid, *tensors, K, D, **options)
    return rows_SD


def dispatch_backward(grad_SD: Tensor, inverse_TK: Tensor) -> Tensor:
    """As :func:`..eager.dispatch_backward`."""
    return _gather_sum(grad_SD, None, inverse_TK)


def combine(y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """As :func:`..eager.combine`."""
    return _gather_sum(y_SD, weight_TK.contiguous(), inverse_TK)


def combine_backward(
    grad_TD: Tensor, y_SD: Tensor, weight_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`..eager.combine_backward`."""
    (T, K), D = inverse_TK.shape, y_SD.shape[1]
    grad_y_SD, grad_weight_TK = y_SD.new_empty(y_SD.shape), weight_TK.new_empty(T, K)
    if T:
        (_, _), options = _grid(grad_TD)
        inputs = (t.contiguous() for t in (grad_TD, y_SD, weight_TK, inverse_TK))
        launch(
            kernels.scatter_scaled,
            (T,),
            *inputs,
            grad_y_SD,
            grad_weight_TK,
            K,
            D,
            **options,
        )
    return grad_y_SD, grad_weight_TK


def _gather_sum(rows_SD: Tensor, weight_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    (T, K), D = inverse_TK.shape, rows_SD.shape[1]
    out_TD = rows_SD.new_empty(T, D)
    if out_TD.numel():
        grid, options = _grid(out_TD)
        launch(
            kernels.gather_sum,
            grid,
            rows_SD.contiguous(),
            rows_SD if weight_TK is None else weight_TK,
            inverse_TK.contiguous(),
            out_TD,
            K,
            D,
            WEIGHTED=weight_TK is not None,
            **options,
        )
    return out_TD


def _grid(tokens_TD: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """A program a token and block of channels, and the blocks' sizes."""
    T, D = tokens_TD.shape
    sizes = sizes_of("experts", tokens_TD.device, D=D)
    return (T, -(-D // sizes["block"])), {"BLOCK": sizes["block"], "num_warps": sizes["num_warps"]}
