"""A Hugging Face folder as a run: read, checked, and written beside its place before it is renamed."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.tokenizer import Tokenizer
from ...errors import UserError
from ..checkpoint import Checkpoints
from ..config import ModelConfig
from ..config_file import dump_model
from ..run_folder import RunFolder
from ..train_state import CARRIED
from .folder import ModelFolder
from .origin import DTYPES, Dtype, Origin, file_dtypes
from .placing import appearing
from .reading import FolderModel, read_model, read_tokenizer

__all__ = ["Imported", "import_folder"]

KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
CARRIED_KEYS = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern", "mtp_layers_block_type")
"""What tensors of multi-token prediction are; kept where tensors are carried through."""

NAMES: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    path: Path
    model: ModelConfig
    parameters: int
    """How many numbers the model has, tied ones once."""
    dtype: str
    """Of most numbers in the files."""
    carried: list[str]
    """Tensors that are only kept."""
    tokenizer: Tokenizer | None
    notes: list[str]


def import_folder(source: str | Path, run: str | Path, *, carry_unknown: bool = False) -> Imported:
    """Make a run's folder of a nemotron_h folder, bit for bit; it appears by a rename, whole or not at all.

    The run has one checkpoint, of step 0, with the weights in fp32 and no optimizer; a training starts
    from it by `checkpoint.init_from`.

    Args:
        run: a folder that is not there yet, or empty.
        carry_unknown: tensors that the model has no place for are kept in the checkpoint and through
            training, and an export writes them again, instead of being refused.

    Raises:
        UserError: something else is at `run`, the folder is damaged or contradicts itself, or the model
            has what plait's layers do not compute.
    """
    run = Path(os.path.abspath(run))
    _check_free(run)
    folder = ModelFolder.open(source)
    read = read_model(folder, allow_unknown=carry_unknown)
    tokenizer = read_tokenizer(folder)
    origin = _origin(folder, read)
    facts = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "config": dump_model(read.config),
        "origin": origin.to_facts(),
    }
    saved = {f"model.{name}": tensor for name, tensor in read.tensors.items()}
    saved |= {CARRIED + name: tensor for name, tensor in read.unknown.items()}
    with appearing(run) as temporary:
        target = RunFolder(temporary)
        Checkpoints(target.checkpoints).save(0, saved, facts)
        target.config_file.write_text(_config_text(folder, read.config), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_into(temporary)
    return Imported(
        run,
        read.config,
        sum(t.numel() for name, t in read.tensors.items() if not name.endswith("correction_bias")),
        origin.dtype,
        list(read.unknown),
        tokenizer,
        read.notes + _notes(tokenizer, read.config, folder.path),
    )


def _check_free(run: Path) -> None:
    if run.is_symlink() or (run.exists() and not run.is_dir()):
        raise UserError(f"{run}: is no folder; choose another name for the run")
    if run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run}: exists and is not empty; choose another name for the run")


def _origin(folder: ModelFolder, read: FolderModel) -> Origin:
    there: dict[str, Dtype] = {e.name: NAMES[read.matching.places[e.name].held.dtype] for e in read.entries}
    numbers: Counter[Dtype] = Counter()
    for entry in read.entries:
        numbers[there[entry.name]] += math.prod(entry.shape)
    (most, _), *_ = numbers.most_common(1)
    usual = file_dtypes(read.entries, most, {})
    kept = (*KEPT_KEYS, *(CARRIED_KEYS if read.unknown else ()))
    return Origin(
        folder=folder.path.resolve().name,
        dtype=most,
        config={key: folder.config[key] for key in kept if _is_plain(folder.config.get(key, math.inf))},
        dtypes={name: kind for name, kind in there.items() if DTYPES[kind] != usual[name]},
    )


def _is_plain(value: Any) -> bool:
    """Whether an id, a number, a text, or a list of those."""
    if isinstance(value, list):
        return all(_is_plain(item) and not isinstance(item, list) for item in value)
    return value is None or isinstance(value, int | str)


def _notes(tokenizer: Tokenizer | None, model: ModelConfig, path: Path) -> list[str]:
    if tokenizer is None:
        return [f"{path} has no tokenizer.json and no tokenizer.model: the run has no tokenizer"]
    if tokenizer.vocab_size > model.vocab_size:
        return [
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.vocab_size} rows: a text "
            "with one of the others cannot be trained on"
        ]
    return []


def _config_text(folder: ModelFolder, model: ModelConfig) -> str:
    return (
        f"# Imported from {folder.path.resolve().name}. A training begins with these weights where its\n"
        "# config names this folder as checkpoint.init_from; it needs no model: section then.\n"
        f"{dump_model(model)}"
    )
