"""A model ready to be used: found by RUN or RUN@STEP, loaded, and held as it computes."""

from dataclasses import dataclass

import torch
import yaml

from ..data.tokenizer import Tokenizer
from .config import Config, ModelConfig
from .config_file import parse_config, parse_model
from .model import Hybrid
from .named_checkpoints import find_checkpoint
from .run_folder import RunFolder

__all__ = [
    "LoadedModel",
    "LoadedRun",
    "empty_model",
    "held_as_computed",
    "load_run",
]

MATRICES = ("_proj", "_proj.weight", "embedding.weight", "head.weight")
"""Ends of the names of parameters that training casts where it uses them."""

EXACT_MATRICES = ("dt_proj.weight",)
"""Of these, what it uses in at least fp32, as it does all others."""


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: Hybrid
    """On the GPU, where there is one; without gradients."""
    dtype: torch.dtype
    """Of the computation."""
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class LoadedRun(LoadedModel):
    folder: RunFolder
    step: int
    """Of the checkpoint."""
    config: Config | None
    """What it was trained with; None for an imported model, which no run has trained."""


def load_run(reference: str, *, dtype: str | None = None) -> LoadedRun:
    """Load a run's model.

    Args:
        reference: the run's folder, which means its newest checkpoint, or RUN@STEP.
        dtype: of the computation; None is the run's `train.dtype`, or float32 for an imported model.

    Raises:
        UserError: no such run or step, or a damaged checkpoint.
    """
    folder, checkpoint = find_checkpoint(reference)
    tree, origin = yaml.safe_load(checkpoint.manifest.facts["config"]), str(checkpoint.path)
    config = parse_config(tree, origin) if "train" in tree else None
    wanted = getattr(torch, dtype or (config.train.dtype if config else "float32"))
    stored = checkpoint.tensors.get("model.embedding.weight")
    model = empty_model(parse_model(tree, origin), stored.dtype if stored else torch.float32)
    checkpoint.load_into({f"model.{name}": t for name, t in model.state_dict().items()}, partial=True)
    return LoadedRun(
        f"step {checkpoint.step} of {folder.path}",
        held_as_computed(model, wanted),
        wanted,
        folder.tokenizer(),
        folder,
        checkpoint.step,
        config,
    )


def empty_model(config: ModelConfig, dtype: torch.dtype) -> Hybrid:
    """A model on the CPU whose tensors are to be filled."""
    with torch.device("meta"):
        model = Hybrid(config)
    model = model.to(dtype).to_empty(device="cpu")
    for router in model.routers:
        router.counts.zero_()
    return model


def held_as_computed(model: Hybrid, dtype: torch.dtype) -> Hybrid:
    """The model as it computes in `dtype`: under bf16, what every step would cast is held in bf16, and
    what multiplies in fp32 in training does so here."""
    model = model.to(torch.promote_types(dtype, torch.float32)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(MATRICES) and not name.endswith(EXACT_MATRICES):
            parameter.data = parameter.data.to(dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
