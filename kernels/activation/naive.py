"""The executable specification of the activations."""

import torch
from torch import Tensor

__all__ = ["squared_relu", "swiglu"]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)²``."""
    return torch.where(x > 0, x, 0.0) ** 2


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate / (1 + exp(-gate)) * up``."""
    return gate / (1 + torch.exp(-gate)) * up
