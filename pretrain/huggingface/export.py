"""A run's checkpoint as a Hugging Face folder: written beside its place, read back, then renamed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from ...data.mixture import Plan, open_sources
from ...data.window import window
from ...errors import UserError
from ..checkpoint import Checkpoint, Checkpoints
from ..config import Config, ModelConfig
from ..config_file import parse_config
from ..model import Hybrid
from ..run_folder import RunFolder, read_metrics
from .card import Facts, model_card
from .config import check_fits, config_json, generation_config_json, notes
from .names import tensor_map
from .placing import appearing, check_target, disk_errors
from .shards import is_exact, write_shards
from .tokenizer import convert_tokenizer
from .verify import check_model, check_tokenizer, compute

__all__ = ["Exported", "export_run"]

SHARD_BYTES = 5 * 10**9

WINDOWS = 3
WINDOW_TOKENS = 251
"""What is compared: an odd number, so that padding to whole chunks is met."""


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
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Export a checkpoint of a run to a folder that transformers loads without remote code.

    The folder appears by a rename once transformers has loaded it and agreed; an earlier export of
    plait is replaced.

    Args:
        step: of the checkpoint; None is the newest.
        dtype: on disk; A_log, D, dt_bias, router weights and biases stay float32.
        shard_bytes: a safetensors file holds no more, unless a single tensor does.

    Raises:
        UserError: no such run or step, a model that does not fit, or something else is at `out`.
        ExportError: transformers does not read what was written as what it was.
    """
    folder, out = RunFolder.open(run), Path(os.path.abspath(out))
    checkpoint = _find(folder, step)
    config = parse_config(yaml.safe_load(checkpoint.manifest.facts["config"]), str(checkpoint.path))
    check_fits(config.model)
    check_target(out)
    tokenizer, model = folder.tokenizer(), _load(checkpoint, config.model)
    if dtype == "bfloat16":
        _round(model)
    texts = _texts(out.name, folder, checkpoint, config, model, dtype)
    entries = tensor_map(config.model)
    tokens_BL, source = _windows(checkpoint, config.model)
    with appearing(out) as temporary:
        with disk_errors(out):
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(temporary / "tokenizer.model")
            kind = getattr(torch, dtype)
            write_shards(temporary, entries, model.state_dict(), dtype=kind, shard_bytes=shard_bytes)
        expected = compute(model, tokens_BL)
        # transformers holds the model a second time, and needs the room.
        del model
        agreement = check_model(temporary, entries, tokens_BL, expected)
        if tokenizer is not None:
            check_tokenizer(temporary, tokenizer)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    remarks = notes(config.model)
    if tokenizer is None:
        remarks.append(f"{folder.path} has no tokenizer, so the folder has none: the model speaks in ids")
    compared = f"{agreement.positions} positions of {source}"
    return Exported(out, checkpoint.step, files, agreement.logit_error, compared, remarks)


def _find(folder: RunFolder, step: int | None) -> Checkpoint:
    found = Checkpoints(folder.checkpoints).all()
    if not found:
        raise UserError(f"{folder.path}: holds no whole checkpoint yet; train on, then export")
    if step is None:
        return found[-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise UserError(f"{folder.path}: holds no checkpoint of step {step}; choose one of {steps}")


def _load(checkpoint: Checkpoint, config: ModelConfig) -> Hybrid:
    """The checkpoint's model on the CPU, in fp32."""
    with torch.device("meta"):
        model = Hybrid(config)
    stored = checkpoint.tensors.get("model.embedding.weight")
    model = model.to(stored.dtype if stored else torch.float32).to_empty(device="cpu")
    checkpoint.load_into({f"model.{name}": t for name, t in model.state_dict().items()}, partial=True)
    return model.float().eval()


@torch.no_grad()
def _round(model: Hybrid) -> None:
    """Give every weight the value it has in bf16, so that plait computes with what is written."""
    for name, tensor in model.state_dict().items():
        if not is_exact(name):
            tensor.copy_(tensor.bfloat16())


def _texts(
    name: str, folder: RunFolder, checkpoint: Checkpoint, config: Config, model: Hybrid, dtype: str
) -> dict[str, str]:
    """The files beside the tensors, by name."""
    has_tokenizer = folder.tokenizer_file.is_file()
    converted = convert_tokenizer(folder.tokenizer_file) if has_tokenizer else None
    special = converted.special if converted else None
    longest = max(stage.seq_len for stage in _plan(checkpoint).stages)
    total, active = Facts.count(model)
    card = Facts(
        name=name,
        config=config,
        step=checkpoint.step,
        tokens=int(checkpoint.manifest.facts["tokens"]),
        window=longest,
        **_losses(folder, checkpoint.step),
        parameters=total,
        active_parameters=active,
        dtype=dtype,
        has_tokenizer=has_tokenizer,
    )
    return {
        "config.json": _json(config_json(config.model, special, max_positions=longest, dtype=dtype)),
        "generation_config.json": _json(generation_config_json(config.model, special)),
        "README.md": model_card(card),
        **(converted.files if converted else {}),
    }


def _plan(checkpoint: Checkpoint) -> Plan:
    return Plan.from_json(checkpoint.manifest.facts["plan"])


def _windows(checkpoint: Checkpoint, model: ModelConfig) -> tuple[Tensor, str]:
    """Some windows (B, L) and where they are from: what training would read next, or ids at random
    where the shards are elsewhere."""
    plan, first = _plan(checkpoint), int(checkpoint.manifest.facts["samples"])
    length = min(WINDOW_TOKENS, plan.sample(first).seq_len)
    try:
        shards = open_sources(plan, first)
        rows = [window(plan, shards, first + i, isolate_documents=False)["tokens"] for i in range(WINDOWS)]
        return torch.stack([torch.from_numpy(row[:length]) for row in rows]), "the run's data"
    except UserError:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (WINDOWS, length), generator=generator)
        return ids, "random ids, as the run's shards are not here"


def _losses(folder: RunFolder, step: int) -> dict[str, float | None]:
    """What the run's metrics say of a step; nothing where they are gone."""
    try:
        record = next((r for r in read_metrics(folder.metrics_file) if r["step"] == step), {})
    except UserError:
        record = {}
    return {name: record.get(name) for name in ("loss", "validation_loss")}


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"
