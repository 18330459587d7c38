"""The small modules that every mixer is made of, and what a mixer is.

Shapes: B batch, L length, D model width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.normalization import rms_norm
from .parameters import Constant, Rule, declare

__all__ = ["Cache", "Linear", "Mixer", "MixerOutput", "Packing", "RMSNorm", "WeightOf", "exact"]


@dataclass(frozen=True)
class Packing:
    """How documents lie in the sequences of a batch."""

    positions_BL: Tensor
    """Each token's place in its document, from 0."""
    document_ids_BL: Tensor | None
    """Non-decreasing along a sequence, from 0; None where documents are not isolated."""

    @property
    def last_document_BL(self) -> Tensor | None:
        """True at the tokens of each row's last document; None where a row is one."""
        ids = self.document_ids_BL
        return ids == ids[:, -1:] if ids is not None else None


@dataclass
class MixerOutput:
    """What a mixer gives back, without side effects, so that a layer may be computed twice."""

    y_BLD: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Differentiable scalars to be added to the training loss, already weighted: sums, not means."""
    counts_E: Tensor | None = None
    """Tokens that each expert got, if the mixer has experts."""
    state_norm: Tensor | None = None
    """Root mean square of the SSM states after the last token, if the mixer has them."""


class Cache:
    """What a mixer keeps of the tokens so far, to go on by one; the mixer itself remembers nothing."""


class Mixer(nn.Module):
    """What a layer of the pattern computes from its normalised input.

    `forward` is training's. `prefill` and `step` are generation's, without gradients; a mixer whose
    tokens do not see each other has them from here.
    """

    def forward(self, x_BLD: Tensor, packing: Packing) -> MixerOutput:
        raise TypeError(f"{type(self).__name__} is a mixer without a forward")

    def prefill(self, x_BLD: Tensor, packing: Packing, capacity: int) -> tuple[Tensor, Cache | None]:
        """The output of `forward`, and what `step` needs to continue each row's last document.

        Args:
            capacity: tokens that a row will hold at most, those of x included.
        """
        return self(x_BLD, packing).y_BLD, None

    def step(self, x_B1D: Tensor, positions_B1: Tensor, cache: Cache | None) -> Tensor:
        """The output for each row's next token, (B, 1, D); the cache moves on in place."""
        return self(x_B1D, Packing(positions_B1, None)).y_BLD


class Linear(nn.Module):
    """``x W^T`` without bias, in x's dtype; the weight is (out, in), kept in the model's dtype."""

    def __init__(self, d_in: int, d_out: int, rule: Rule) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (d_out, d_in), rule)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Over the last dim; the weight multiplies in at least fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (width,), Constant(1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WeightOf(nn.Module):
    """A weight, and perhaps a bias, for a kernel that is called elsewhere."""

    def __init__(self, shape: tuple[int, ...], rule: Rule, *, bias: Rule | None = None) -> None:
        super().__init__()
        self.weight = declare(self, "weight", shape, rule)
        self.bias = declare(self, "bias", shape[:1], bias) if bias is not None else None


def exact(tensor: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
