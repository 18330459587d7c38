"""A run's checkpoint as a Hugging Face folder: written beside its place, read back, then renamed."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.plan import Plan, open_sources
from ...data.window import window
from ...errors import UserError, few
from ..checkpoint import Checkpoint
from ..config import Config, ModelConfig
from ..config_file import parse_config
from ..initial_weights import model_of
from ..loading import empty_model
from ..metrics_file import read_metrics
from ..model import Hybrid
from ..named_checkpoints import choose_intact
from ..run_folder import RunFolder
from ..saved_facts import config_tree
from ..train_state import CARRIED, empty_carried
from .card import Facts, model_card
from .config import check_fits, config_json, generation_config_json, notes
from .names import FileTensor, tensor_map
from .origin import Dtype, Origin, file_dtypes
from .placing import appearing, check_target, disk_errors
from .shards import write_shards
from .tokenizer import ExportedTokenizer, export_tokenizer
from .verify import check_model, check_tokenizer, compute

__all__ = ["Exported", "export_run"]

SHARD_BYTES = 5 * 10**9

WINDOWS = 3
WINDOW_TOKENS = 251
"""What is compared: an odd number, so that padding to whole chunks is met."""

POSITIONS, UNKNOWN_POSITIONS = "max_position_embeddings", 4096
"""Nothing in the model depends on it; 4096 is what transformers takes where nobody knows."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how well transformers agrees with it."""

    path: Path
    step: int
    files: dict[str, int]
    """Name -> bytes."""
    logit_error: float
    """The largest difference from plait's logits, relative to the largest logit."""
    compared: str
    """What the logits were compared on."""
    notes: list[str]


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Export a checkpoint of a run to a folder that transformers loads without remote code.

    The folder appears by a rename once transformers has loaded it and agreed; an earlier export of
    plait is replaced.

    Args:
        step: of the checkpoint; None is the newest.
        dtype: on disk; A_log, D, dt_bias, router weights and biases stay float32. None is that of the
            folder that the weights were imported from, float32 where they began here. Weights that were
            imported and not trained get the very dtypes that they came in.
        shard_bytes: a safetensors file holds no more, unless a single tensor does.

    Raises:
        UserError: no such run or step, a model that does not fit, or something else is at `out`.
        ExportError: transformers does not read what was written as what it was.
    """
    folder, out = RunFolder.open(run), Path(os.path.abspath(out))
    checkpoint = choose_intact(folder, None if step is None else str(step), remedy="train on, then export")
    config, origin = model_of(checkpoint), Origin.from_facts(checkpoint.manifest.facts)
    check_fits(config)
    check_target(out)
    model, carried = _load(checkpoint, config)
    dtype = dtype or (origin.dtype if origin else "float32")
    entries = tensor_map(config)
    dtypes = file_dtypes(entries, dtype, origin.dtypes if origin and origin.dtype == dtype else {})
    _round(model, entries, dtypes)
    tokenizer = folder.tokenizer()
    brought = export_tokenizer(tokenizer, imported=origin is not None) if tokenizer else None
    texts = _texts(out.name, folder, checkpoint, model, dtype, brought)
    tokens_BL, source = _windows(checkpoint, config)
    with appearing(out) as temporary:
        with disk_errors(out):
            for name, content in (texts | (brought.files if brought else {})).items():
                (temporary / name).write_bytes(content)
            tensors = model.state_dict()
            write_shards(temporary, entries, tensors, dtypes=dtypes, shard_bytes=shard_bytes, carried=carried)
        expected = compute(model, tokens_BL)
        # transformers holds the model a second time, and needs the room.
        del model, tensors
        agreement = check_model(temporary, entries, tokens_BL, expected, carried=bool(carried))
        if tokenizer and brought and not brought.note:
            check_tokenizer(temporary, tokenizer)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    remarks = notes(config)
    if carried:
        remarks.append(
            f"{few(list(carried))} are written as they were imported; no layer was trained on them"
        )
    if brought is None:
        remarks.append(f"{folder.path} has no tokenizer, so the folder has none: the model speaks in ids")
    elif brought.note:
        remarks.append(brought.note)
    compared = f"{agreement.positions} positions of {source}"
    return Exported(out, checkpoint.step, files, agreement.logit_error, compared, remarks)


def _load(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Hybrid, dict[str, Tensor]]:
    """The checkpoint's model on the CPU, in fp32, and what it only passes on."""
    stored = checkpoint.tensors.get("model.embedding.weight")
    model = empty_model(config, stored.dtype if stored else torch.float32)
    carried = empty_carried(checkpoint)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {CARRIED + name: tensor for name, tensor in carried.items()}
    checkpoint.load_into(tensors, partial=True)
    return model.float().eval(), carried


@torch.no_grad()
def _round(model: Hybrid, entries: Sequence[FileTensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Give every weight the value it has in the files, so that plait computes with what is written.

    Raises:
        UserError: one that float16 cannot hold.
    """
    tensors = model.state_dict()
    for entry in entries:
        dtype = dtypes[entry.name]
        for part in entry.parts if dtype != torch.float32 else ():
            tensor = tensors[part.name] if part.expert is None else tensors[part.name][part.expert]
            rounded = tensor.to(dtype)
            if dtype == torch.float16 and (rounded.isinf() & tensor.isfinite()).any():
                largest = float(tensor.abs().max())
                raise UserError(
                    f"dtype = float16 cannot hold {entry.name}, which reaches {largest:.3g}; "
                    "choose bfloat16 or float32"
                )
            tensor.copy_(rounded)


def _texts(
    name: str,
    folder: RunFolder,
    checkpoint: Checkpoint,
    model: Hybrid,
    dtype: Dtype,
    tokenizer: ExportedTokenizer | None,
) -> dict[str, bytes]:
    """config.json, generation_config.json and README.md, by name."""
    facts = checkpoint.manifest.facts
    origin, training = Origin.from_facts(facts), _training(checkpoint)
    special = tokenizer.special if tokenizer else None
    kept = origin.config if origin else {}
    longest = max((stage.seq_len for stage in _plan(facts).stages), default=0) if training else 0
    positions = max(longest, _positions(kept)) or UNKNOWN_POSITIONS
    kept = {key: value for key, value in kept.items() if key != POSITIONS}
    total, active = Facts.count(model)
    card = Facts(
        name=name,
        model=model.config,
        training=training,
        origin=origin.folder if origin else None,
        step=checkpoint.step,
        tokens=int(facts["tokens"]),
        window=longest,
        **_losses(folder, checkpoint.step),
        parameters=total,
        active_parameters=active,
        dtype=dtype,
        tokenizer=tokenizer.kind if tokenizer else None,
    )
    trees = {
        "config.json": config_json(model.config, special, max_positions=positions, dtype=dtype, kept=kept),
        "generation_config.json": generation_config_json(model.config, special, kept),
    }
    texts = {file: json.dumps(tree, indent=2, allow_nan=False) + "\n" for file, tree in trees.items()}
    return {file: text.encode() for file, text in (texts | {"README.md": model_card(card)}).items()}


def _training(checkpoint: Checkpoint) -> Config | None:
    """The config of the training that made a checkpoint; None of an import's."""
    facts = checkpoint.manifest.facts
    return parse_config(config_tree(checkpoint), str(checkpoint.path)) if "plan" in facts else None


def _plan(facts: Mapping[str, Any]) -> Plan:
    return Plan.from_json(facts["plan"])


def _positions(kept: Mapping[str, Any]) -> int:
    said = kept.get(POSITIONS)
    return said if isinstance(said, int) else 0


def _windows(checkpoint: Checkpoint, model: ModelConfig) -> tuple[Tensor, str]:
    """Some windows (B, L) and where they are from: what training would read next, or ids at random
    where there are no shards."""
    facts = checkpoint.manifest.facts
    if "plan" not in facts:
        return _random_windows(model, WINDOW_TOKENS), "random ids, as an imported model has no data"
    plan, first = _plan(facts), int(facts["samples"])
    length = min(WINDOW_TOKENS, plan.sample(first).seq_len)
    try:
        shards = open_sources(plan, first)
        rows = [
            window(plan, shards, index, isolate_documents=False)["tokens"]
            for index in plan.take(first, WINDOWS)
        ]
        return torch.stack([torch.from_numpy(row[:length]) for row in rows]), "the run's data"
    except UserError:
        return _random_windows(model, length), "random ids, as the run's shards are not here"


def _random_windows(model: ModelConfig, length: int) -> Tensor:
    return torch.randint(model.vocab_size, (WINDOWS, length), generator=torch.Generator().manual_seed(0))


def _losses(folder: RunFolder, step: int) -> dict[str, float | None]:
    """What the run's metrics say of a step; nothing where they are gone."""
    try:
        record = next((r for r in read_metrics(folder.metrics_file) if r["step"] == step), {})
    except UserError:
        record = {}
    return {name: record.get(name) for name in ("loss", "validation_loss")}
