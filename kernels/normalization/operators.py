"""``plait::rms_norm``, ``plait::add_rms_norm``, ``plait::gated_rms_norm``, their backwards, and what calls
them."""

# D width, G groups, T tokens: the product of all leading dims

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..forms import form_of
from . import eager

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dim (arXiv 1910.07467).

    Args:
        x: ``(…, D)``.
        weight_D: ``(D,)``, any floating dtype; it multiplies in fp32 at least.
        eps: added to the mean square.

    Returns:
        The shape and dtype of x, rounded once at the end.

    Raises:
        ValueError: the widths of x and weight differ.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight_D.shape)}, x is {tuple(x.shape)}")
    return _rms_norm(x, weight_D, eps)[0]


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y`` and its `rms_norm`: the step from one layer to the next.

    Args:
        x, y: ``(…, D)``, of one dtype.

    Returns:
        Two of the shape and dtype of x; the norm is of the sum as it is rounded.

    Raises:
        ValueError: the shapes or dtypes do not fit together.
    """
    if weight_D.shape != x.shape[-1:] or x.shape != y.shape or x.dtype != y.dtype:
        sides = (
            f"x is {tuple(x.shape)} {x.dtype}, y {tuple(y.shape)} {y.dtype}, weight {tuple(weight_D.shape)}"
        )
        raise ValueError(f"add_rms_norm: {sides}")
    return _add_rms_norm(x, y, weight_D, eps)[:2]


def gated_rms_norm(x: Tensor, z: Tensor, weight_D: Tensor, eps: float, num_groups: int) -> Tensor:
    """Mamba-2's norm (arXiv 2405.21060): RMSNorm of ``x * silu(z)``, each group of channels by itself.

    Args:
        x: ``(…, D)``.
        z: the gate, shaped as x.
        weight_D: ``(D,)``, any floating dtype; it multiplies in fp32 at least.
        eps: added to a group's mean square.
        num_groups: divides D.

    Returns:
        The shape and dtype of x, rounded once at the end.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if z.shape != x.shape or weight_D.shape != x.shape[-1:]:
        shapes = f"weight is {tuple(weight_D.shape)}, x {tuple(x.shape)}, z {tuple(z.shape)}"
        raise ValueError(f"gated_rms_norm: {shapes}")
    if x.shape[-1] % num_groups:
        raise ValueError(f"gated_rms_norm: num_groups = {num_groups} does not divide {x.shape[-1]} channels")
    return _gated_rms_norm(x, z, weight_D, eps, num_groups)[0]


def _form(x: Tensor, num_groups: int) -> ModuleType:
    if form_of(x) == "torch":
        return eager
    from . import triton

    return triton if triton.fits(x, num_groups) else eager


@torch.library.custom_op("plait::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _form(x, 1).forward(x, None, weight, eps, 1)


@torch.library.custom_op("plait::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dweight = _form(x, 1).backward(dy, x, None, weight, r)
    return dx, dweight


@torch.library.custom_op("plait::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _form(x, 1).add_forward(x, y, weight, eps)


@torch.library.custom_op("plait::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    return _form(total, 1).add_backward(dtotal, dy, total, weight, r)


@torch.library.custom_op("plait::gated_rms_norm", mutates_args=())
def _gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    return _form(x, num_groups).forward(x, z, weight, eps, num_groups)


@torch.library.custom_op("plait::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _form(x, r.shape[1]).backward(dy, x, z, weight, r)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _reciprocals(x: Tensor, num_groups: int) -> Tensor:
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(tokens, num_groups, 1, dtype=torch.promote_types(x.dtype, torch.float32))


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _reciprocals(x, 1)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(weight)


@_add_rms_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _reciprocals(x, 1)


@_add_rms_norm_backward.register_fake
def _(dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return _like(total), _like(weight)


@_gated_rms_norm.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> tuple[Tensor, Tensor]:
    return _like(x), _reciprocals(x, num_groups)


@_gated_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(z), _like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None


def _differentiate_gated(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dz, dweight = _gated_rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dz, dweight, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, inputs[2], r)


def _differentiate_sum(
    ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dweight = _add_rms_norm_backward(dtotal, dy, *ctx.saved_tensors)
    return dx, dx, dweight, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)
_gated_rms_norm.register_autograd(_differentiate_gated, setup_context=_save)
