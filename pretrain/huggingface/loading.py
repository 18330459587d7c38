"""A Hugging Face folder's model ready to be used, without a run made of it."""

from pathlib import Path

import torch

from ..loading import LoadedModel, empty_model, held_as_computed
from .folder import ModelFolder
from .reading import read_model, read_tokenizer

__all__ = ["load_folder"]


def load_folder(path: str | Path, *, dtype: str | None = None) -> LoadedModel:
    """Load a nemotron_h folder.

    Args:
        dtype: of the computation; None is float32.

    Raises:
        UserError: the folder is damaged, or its files hold another model than its config.json describes.
    """
    path, wanted = Path(path), getattr(torch, dtype or "float32")
    folder = ModelFolder.open(path)
    # What the model has no place for, such as heads that predict further tokens, computes nothing here.
    read = read_model(folder, allow_unknown=True)
    model = empty_model(read.config, torch.float32)
    model.load_state_dict(read.tensors)
    return LoadedModel(str(path), held_as_computed(model, wanted), wanted, read_tokenizer(folder))
