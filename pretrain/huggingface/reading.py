"""From a Hugging Face folder to plait's tensors, bit for bit, and the tokenizer that lies beside them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer, load_tokenizer
from ...errors import UserError, few
from ..config import ModelConfig
from .config import MARKER
from .folder import ModelFolder
from .matching import Matching, match
from .names import FileTensor, from_files, tensor_map
from .read_config import read_model_config

__all__ = ["FolderModel", "read_model", "read_tokenizer"]

MOST_LAYERS_LACKING = 256
"""Layers beyond the number of tensors, which have to be missing; that so few are is said tensor by tensor."""

MOST_EXPERTS = 2**18
"""Of all layers; each has tensors of its own in a folder."""

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class FolderModel:
    """What a folder holds."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """The state dict of plait's model, in fp32 on the CPU."""
    entries: list[FileTensor]
    """Where they come from, without those of the table that the folder may lack."""
    matching: Matching
    unknown: dict[str, Tensor]
    """Tensors that the model has no place for, as they are."""
    notes: list[str]
    """What the owner should know, a line each."""


def read_model(folder: ModelFolder, *, allow_unknown: bool) -> FolderModel:
    """Read all tensors of a folder.

    Args:
        allow_unknown: tensors that the model has no place for are no error.

    Raises:
        UserError: the model has what plait's layers do not compute, or the files hold another one.
    """
    path = folder.path / "config.json"
    model, notes = read_model_config(folder.config, path)
    matching = _match(folder, model)
    if matching.unknown and not allow_unknown:
        raise UserError(
            f"{folder.path}: holds {few(matching.unknown)}, which the model of its config.json has no place "
            "for; add --carry-unknown to keep such tensors unchanged"
        )
    with folder.reading() as held:
        tensors, model, more = _read(matching, model, held)
        unknown = {name: held(name) for name in matching.unknown}
    return FolderModel(model, tensors, _present(model, matching), matching, unknown, notes + more)


def _match(folder: ModelFolder, model: ModelConfig) -> Matching:
    config_file = folder.path / "config.json"
    experts = model.moe.num_experts if model.moe else 0
    rows = [tensor.shape[0] for tensor in folder.tensors.values() if tensor.shape]
    if len(model.layers) > MOST_LAYERS_LACKING + len(folder.tensors):
        # This and what follows: before a table of so many tensors is made.
        raise UserError(
            f"{config_file}: names {len(model.layers)} layers, and the files hold {len(folder.tensors)} "
            "tensors; bring the config.json that belongs to these weights"
        )
    if experts > max(rows, default=experts):
        raise UserError(
            f"{config_file}: n_routed_experts = {experts}, and no tensor here has so many rows; "
            "bring the config.json that belongs to these weights"
        )
    if experts * model.layers.count("E") > MOST_EXPERTS:
        raise UserError(
            f"{config_file}: n_routed_experts = {experts} in {model.layers.count('E')} layers, more than "
            f"{MOST_EXPERTS} together; bring the config.json that belongs to these weights"
        )
    try:
        entries = tensor_map(model)
    except (RuntimeError, OverflowError, MemoryError):
        raise UserError(f"{config_file}: describes a model too large to be one; download it again") from None
    matching = match(entries, folder.tensors, folder.path)
    missing = [name for name in matching.missing if not (name == HEAD and model.tie_embeddings)]
    if missing:
        raise UserError(
            f"{folder.path}: lacks {few(missing)}, which the model of its config.json has; "
            "bring the whole folder, or the config.json that belongs to it"
        )
    return matching


def _read(
    matching: Matching, model: ModelConfig, held: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """Plait's tensors in fp32, the model that they are of, and what to know about it.

    transformers ties nothing, whatever tie_word_embeddings says: a head of its own stays one.
    """

    def read(name: str) -> Tensor:
        return matching.read(name, held).float()

    notes = []
    if model.tie_embeddings and HEAD not in matching.places:
        notes.append(
            f"tie_word_embeddings = true and no {HEAD}: the embedding is the head; transformers itself would "
            "draw one at random, and an export writes it out"
        )
    elif model.tie_embeddings and not torch.equal(read(HEAD), read(EMBEDDING)):
        notes.append(
            f"tie_word_embeddings = true, but {HEAD} is another matrix than the embedding: both came in, as "
            "transformers computes with both (model.tie_embeddings = false)"
        )
        model = model.model_copy(update={"tie_embeddings": False})
    return from_files(_present(model, matching), read), model, notes


def _present(model: ModelConfig, matching: Matching) -> list[FileTensor]:
    return [entry for entry in tensor_map(model) if entry.name in matching.places]


def read_tokenizer(folder: ModelFolder) -> Tokenizer | None:
    """tokenizer.json decides where both kinds are there, except in an export of plait's own, whose
    tokenizer.json was made from the other."""
    own = MARKER in folder.config
    files = {"tokenizer.json": folder.path, "tokenizer.model": folder.path / "tokenizer.model"}
    for name in sorted(files, reverse=own):
        if (folder.path / name).is_file():
            return load_tokenizer(files[name])
    return None
