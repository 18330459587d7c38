"""AdamW, its learning rate as a function of the step, and the gradient's global norm."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..parallel.mesh import Mesh
from ..parallel.placements import gradient_norm, scale_gradients, sum_replicated_gradients
from .config import OptimConfig

__all__ = ["build_optimizer", "clip_gradients", "learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; those with one dimension do not decay."""
    groups: dict[Any, dict[str, Any]] = {}
    for parameter in model.parameters():
        decays = parameter.ndim > 1
        # torch moves a group's parameters by one call, which wants them on one device mesh.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = {"params": [], "weight_decay": config.weight_decay if decays else 0.0}
        groups.setdefault((decays, mesh), group)["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """The learning rate of a step of a schedule, 1 being the first, of so many steps.

    The warmup reaches the peak at its last step; a decay would reach `min_lr` at the step after the
    run's last, so that no step is spent standing still.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = step - 1
    if optim.schedule == "cosine":
        progress = (done - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif optim.schedule == "wsd":
        decay = optim.decay_steps or max(1, steps // 5)
        factor = min(1.0, max(0.0, (steps - done) / decay))
    else:
        return optim.lr
    return optim.lr * factor + optim.min_lr * (1 - factor)


def clip_gradients(model: nn.Module, mesh: Mesh, clip: float | None) -> Tensor:
    """Complete the gradients over all ranks and scale them to a global norm of at most `clip`.

    Returns:
        The norm before, the same on every rank.
    """
    parameters = list(model.parameters())
    sum_replicated_gradients(parameters, mesh)
    norm = gradient_norm(parameters, mesh)
    if clip is not None:
        scale_gradients(parameters, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm
