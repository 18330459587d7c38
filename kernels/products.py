"""Matrix products in bf16 on a processor that has no instructions for it.

There torch multiplies bf16 several times slower than fp32, some operands seventy times (an AVX2 EPYC, torch
2.13). So operands are widened, which is exact, multiplied in fp32, and the result is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear", "product_dtype"]

# A torch without oneDNN has no such operator, and no fast bf16 either.
MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""This processor."""


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In which to multiply tensors like this one: their own, or fp32 for bf16 where that is much faster."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not MULTIPLIES_BF16:
        return torch.float32
    return tensor.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in x's dtype, which is the weight's too."""
    if product_dtype(x) == x.dtype:
        return F.linear(x, weight)
    return _Widened.apply(x, weight)


class _Widened(torch.autograd.Function):
    """It keeps its operands for the backward as they came, in half the bytes."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        wide = grad.float()
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight
