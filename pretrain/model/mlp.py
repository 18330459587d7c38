"""The MLP mixer, ``-``: squared ReLU, or SwiGLU with a gate beside the up projection."""

from torch import Tensor

from ...kernels.activation import squared_relu, swiglu
from ...parallel.collectives import all_gather, reduce_scatter
from ...parallel.mesh import Mesh
from ..model_config import Activation
from .layers import Kept, Linear, Mixer, Packing, Report
from .parameters import Normal

__all__ = ["MLP"]


class MLP(Mixer):
    """Tensor parallelism cuts its hidden channels."""

    def __init__(
        self, d_model: int, d_ff: int, activation: Activation, std: float, out_std: float, mesh: Mesh
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.up_proj = Linear(d_model, d_ff, Normal(std), tp_dim=0)
        self.gate_proj = Linear(d_model, d_ff, Normal(std), tp_dim=0) if activation == "swiglu" else None
        self.down_proj = Linear(d_ff, d_model, Normal(out_std), tp_dim=1)

    def forward(self, x_BLD: Tensor, packing: Packing, kept: Kept) -> tuple[Tensor, Report]:
        return self.contract(self.expand(x_BLD)), Report()

    def expand(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to this rank's hidden channels (B, tp L, F / tp)."""
        x = all_gather(x_BLD, self.mesh.tp, dim=1)
        up = self.up_proj(x)
        return squared_relu(up) if self.gate_proj is None else swiglu(self.gate_proj(x), up)

    def contract(self, hidden_BLF: Tensor) -> Tensor:
        """The hidden channels of all ranks to (B, L, D)."""
        return reduce_scatter(self.down_proj(hidden_BLF), self.mesh.tp, dim=1)
