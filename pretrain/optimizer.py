"""AdamW, its learning rate as a function of the step, and the gradient's global norm."""

import math

import torch
from torch import Tensor, nn

from ..parallel.mesh import Mesh
from ..parallel.placements import gradient_norm, scale_gradients, sum_replicated_gradients
from .config import OptimConfig, TrainConfig

__all__ = ["build_optimizer", "clip_gradients", "learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; those with one dimension do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, optim: OptimConfig, train: TrainConfig) -> float:
    """The learning rate of a step, 1 being the first.

    The warmup reaches the peak at its last step; a decay would reach `min_lr` at the step after the
    run's last, so that no step is spent standing still.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = step - 1
    if optim.schedule == "cosine":
        progress = (done - optim.warmup_steps) / max(1, train.steps - optim.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif optim.schedule == "wsd":
        decay = optim.decay_steps or max(1, train.steps // 5)
        factor = min(1.0, max(0.0, (train.steps - done) / decay))
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
