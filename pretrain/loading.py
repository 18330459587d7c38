"""A model ready to be used: found by RUN or RUN@STEP, loaded, and held as it computes."""

from dataclasses import dataclass

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from .checkpoint import Checkpoint
from .config import Config, ModelConfig
from .config_file import parse_config, parse_model
from .model import Hybrid
from .named_checkpoints import find_intact
from .run_folder import RunFolder
from .saved_facts import config_tree

__all__ = [
    "LoadedModel",
    "LoadedRun",
    "empty_model",
    "empty_on_meta",
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
        reference: the run's folder, which means its newest intact checkpoint, or RUN@STEP.
        dtype: of the computation; None is the run's `train.dtype`, or float32 for an imported model.

    Raises:
        UserError: no such run or step, or a damaged checkpoint.
    """
    folder, checkpoint = find_intact(reference)
    tree, origin = config_tree(checkpoint), str(checkpoint.path)
    config = parse_config(tree, origin) if "train" in tree else None
    wanted = getattr(torch, dtype or (config.train.dtype if config else "float32"))
    model = with_memory(cast(empty_on_meta(parse_model(tree, origin), checkpoint), wanted))
    checkpoint.convert_into(_by_saved_name(model))
    return LoadedRun(
        f"step {checkpoint.step} of {folder.path}",
        _ready(model),
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
    return with_memory(model.to(dtype))


def empty_on_meta(config: ModelConfig, checkpoint: Checkpoint) -> Hybrid:
    """The model that a checkpoint says it holds, in the dtype it has there and without memory.

    Raises:
        UserError: its tensors are not there, or are others: what a config asks for may be absurd, and is
            not made before the files are known to hold it.
    """
    stored = checkpoint.tensors.get("model.embedding.weight")
    if len(config.layers) > len(checkpoint.tensors) or stored is None:
        raise UserError(
            f"{checkpoint.path}: lacks tensors of the model of its config; use another checkpoint"
        )
    try:
        with torch.device("meta"):
            model = Hybrid(config).to(stored.dtype)
    except (RuntimeError, OverflowError, TypeError, MemoryError):
        raise UserError(
            f"{checkpoint.path}: describes a model too large to be one; use another checkpoint"
        ) from None
    checkpoint.check_fits(_by_saved_name(model), partial=True)
    return model


def _by_saved_name(model: Hybrid) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def with_memory(model: Hybrid) -> Hybrid:
    """A model on the meta device, now with memory on the CPU that is to be filled."""
    model = model.to_empty(device="cpu")
    for router in model.routers:
        router.counts.zero_()
    return model


def held_as_computed(model: Hybrid, dtype: torch.dtype) -> Hybrid:
    """A model's weights as they compute in `dtype`, on the GPU, where there is one."""
    return _ready(cast(model, dtype))


def _ready(model: Hybrid) -> Hybrid:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def cast(model: Hybrid, dtype: torch.dtype) -> Hybrid:
    """The model as it computes in `dtype`: under bf16, what every step would cast is held in bf16, and
    what multiplies in fp32 in training does so here."""
    model = model.to(torch.promote_types(dtype, torch.float32)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(MATRICES) and not name.endswith(EXACT_MATRICES):
            parameter.data = parameter.data.to(dtype)
    return model
