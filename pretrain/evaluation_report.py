"""A run's evaluation: which shards, and its record as JSON and as a picture."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest import manifest_of
from ..errors import UserError
from .evaluation import Measured, evaluate, total
from .loading import LoadedRun
from .plot import loss_picture

__all__ = ["evaluate_run", "write_report"]

BINS_AN_OCTAVE = 2
"""Of the picture's averages over places in the window."""


def evaluate_run(
    run: LoadedRun, prefixes: Sequence[str] = (), *, batches: int | None = None
) -> list[Measured]:
    """Evaluate a run as its own training does.

    Args:
        prefixes: shards; none means the run's `data.validation`.
        batches: of `train.batch_size` windows, for each shards; None is the run's `evaluate.batches`.

    Returns:
        One measurement a prefix, in their order.

    Raises:
        UserError: as :func:`evaluate`; no shards named and none in the run; shards of another tokenizer.
    """
    config, tokenizer = run.config, run.tokenizer
    if config is None:
        raise UserError(
            f"{run.folder.path}: an imported model, and nothing says the windows to read; begin a run with "
            "checkpoint.init_from, and evaluate that"
        )
    if not prefixes:
        if config.data.validation is None:
            raise UserError(f"{run.folder.path}: data.validation = null, so name shards with --shards")
        prefixes = [config.data.validation]
    if batches is not None and batches < 1:
        raise UserError(f"batches = {batches}: give 1 or more")
    for prefix in prefixes:
        manifest = manifest_of(prefix)
        if manifest and tokenizer and manifest.tokenizer_sha256 != tokenizer.fingerprint:
            raise UserError(
                f"{prefix}: built with another tokenizer than the one of {run.folder.path}; "
                "rebuild the corpus with that one"
            )
    return [
        evaluate(
            run.model,
            prefix,
            seq_len=config.data.seq_len,
            windows=(batches or config.evaluate.batches) * config.train.batch_size,
            batch_size=config.train.micro_batch_size or config.train.batch_size,
            isolate_documents=config.data.isolate_documents,
            dtype=run.dtype,
            tokenizer=tokenizer,
        )
        for prefix in prefixes
    ]


def write_report(run: LoadedRun, parts: Sequence[Measured], folder: Path) -> None:
    """Write `evaluation.json` and `loss_by_position.png` into a folder, which is made.

    Raises:
        UserError: it cannot be written to.
    """
    record = {
        "run": str(run.folder.path),
        "step": run.step,
        "dtype": str(run.dtype).removeprefix("torch."),
        "seq_len": len(parts[0].targets_L),
        "sources": [_record(part) for part in parts],
        "total": _record(total(parts)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _draw(parts, folder / "loss_by_position.png")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name another folder with --out") from None


def _record(part: Measured) -> dict[str, Any]:
    return {
        "shards": part.prefix,
        "windows": part.windows,
        "targets": part.targets,
        "loss": part.loss,
        "perplexity": part.perplexity,
        "bytes_per_token": part.bytes_per_token,
        "bits_per_byte": part.bits_per_byte,
        "targets_by_position": part.targets_L.tolist(),
        "loss_by_position": [
            loss / count if count else None
            for loss, count in zip(part.loss_sum_L.tolist(), part.targets_L.tolist(), strict=True)
        ],
    }


def _draw(parts: Sequence[Measured], path: Path) -> None:
    """Each source's loss by place in the window: every place as a dot, averages over more as a line."""
    with loss_picture(path, "place in the window (tokens)") as axes:
        for index, part in enumerate(parts):
            losses, targets = part.loss_sum_L.numpy(), part.targets_L.numpy()
            places = np.arange(1, len(losses) + 1)
            seen = targets > 0
            color = f"C{index}"
            axes.plot(places[seen], losses[seen] / targets[seen], ".", color=color, alpha=0.25, markersize=3)
            label = f"{part.prefix}: {part.loss:.3f} nats a token"
            axes.plot(*_averages(losses, targets), color=color, marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)


def _averages(losses: np.ndarray, targets: np.ndarray) -> tuple[list[float], list[float]]:
    """Means over stretches of places that grow with the place: the centre of each, and its loss."""
    widest = np.log2(len(losses)) - 0.5 / BINS_AN_OCTAVE
    starts = np.unique(np.round(2 ** np.arange(0, widest, 1 / BINS_AN_OCTAVE)).astype(int)) - 1
    edges = np.append(starts, len(losses))
    centres, means = [], []
    for start, end in pairwise(edges):
        if count := targets[start:end].sum():
            centres.append(float(np.sqrt((start + 1) * end)))
            means.append(float(losses[start:end].sum() / count))
    return centres, means
