"""Which of a model's parameters are gathered together, and in which dtype: the precision contract's half.

Matrices are gathered in the dtype they compute in. All else, and the embedding and the head, whose
gradients are sums over many tokens, is gathered as it is stored.
"""

import torch
from torch import nn

from ..parallel.fsdp import Unit, shard_parameters
from ..parallel.mesh import Mesh
from .model import Hybrid
from .model.hybrid import Layer
from .model.layers import Linear
from .model.moe import Experts

__all__ = ["expert_modules", "matrices", "shard_model"]


def shard_model(model: Hybrid, mesh: Mesh, dtype: torch.dtype) -> None:
    """Shard a model's parameters, and keep copies alike over dp_replicate.

    Args:
        dtype: of the computation.
    """
    units = []
    if model.head is not None:
        units.append(Unit([model.embedding], in_backward=False))
    for layer in model.layers:
        assert isinstance(layer, Layer)
        narrow = dtype == torch.bfloat16
        experts, rest = expert_modules(layer), matrices(layer)
        if experts:
            units.append(Unit(experts, dtype if narrow else None, layer=layer.index, experts=True))
        # One unit a layer where all else of it is gathered in one dtype.
        if narrow and rest:
            units.append(Unit(rest, dtype, layer=layer.index))
        units.append(Unit([layer], layer=layer.index))
    units.append(Unit([model], stays=True))
    shard_parameters(units, mesh)


def expert_modules(layer: Layer) -> list[nn.Module]:
    """The modules of a layer whose weights are divided over ep; the dtype of the computation is theirs."""
    return [module for module in layer.modules() if isinstance(module, Experts)]


def matrices(layer: Layer) -> list[nn.Module]:
    """The modules of a layer beside experts whose weights are cast to the dtype of the computation."""
    return [
        module
        for name, module in layer.named_modules()
        if isinstance(module, Linear) and not name.endswith("dt_proj")
    ]
