"""The MLP mixer, ``-``: squared ReLU, or SwiGLU with a gate beside the up projection."""

from torch import Tensor

from ...kernels.activation import squared_relu, swiglu
from ..config import Activation
from .layers import Linear, Mixer, MixerOutput, Packing
from .parameters import Normal

__all__ = ["MLP"]


class MLP(Mixer):
    def __init__(self, d_model: int, d_ff: int, activation: Activation, std: float, out_std: float) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff, Normal(std))
        self.gate_proj = Linear(d_model, d_ff, Normal(std)) if activation == "swiglu" else None
        self.down_proj = Linear(d_ff, d_model, Normal(out_std))

    def forward(self, x_BLD: Tensor, packing: Packing) -> MixerOutput:
        return MixerOutput(self.transform(x_BLD))

    def transform(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D); also what a shared expert does."""
        up = self.up_proj(x)
        hidden = squared_relu(up) if self.gate_proj is None else swiglu(self.gate_proj(x), up)
        return self.down_proj(hidden)
