"""Loss and gradients of a drawn model on a drawn batch, whose documents are given and not read."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from programs.gradients import gradients

from plait.data.window import IGNORE
from plait.parallel.mesh import Mesh
from plait.parallel.placements import gradient_norm, sum_replicated_gradients
from plait.pretrain.config import Config
from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import StepCounts, accumulate_gradients
from plait.pretrain.micro_batches import cut_batch
from plait.pretrain.model import build_model
from plait.pretrain.ranks import mesh_of
from plait.pretrain.sharding import shard_model
from plait.pretrain.step_sums import sum_parts


def run(tree: dict[str, Any], documents: list[list[int]], masked: float) -> dict[str, Any]:
    """As the program `gradients`.

    Args:
        documents: lengths of the documents of each row.
        masked: the share of tokens that are no targets beside the documents' last.
    """
    config = parse_config(tree, "test")
    mesh = _connected(config)
    rows, length = config.train.batch_size, config.data.seq_len
    whole = _batch(documents, config.model.vocab_size, masked)
    part = slice(*mesh.tokens(length))
    arrays = {
        name: array[mesh.rows(rows)] if name == "document_ids" else array[mesh.rows(rows), part]
        for name, array in whole.items()
    }
    model = build_model(
        config.model,
        seed=3,
        dtype=torch.float64,
        mesh=mesh,
        activation_checkpointing=config.train.activation_checkpointing,
        shard=lambda model: shard_model(model, mesh, torch.float64),
    )
    targets = int((whole["targets"] != IGNORE).sum())
    counts = StepCounts(targets=targets, tokens=rows * length, sequences=rows)
    micro_batches = cut_batch(
        arrays,
        mesh,
        length=length,
        rows=mesh.most_rows(rows),
        size=config.train.micro_batch_size,
        device=torch.device("cpu"),
        isolate_documents=config.data.isolate_documents,
    )
    parts = accumulate_gradients(
        model, micro_batches, counts, dtype=torch.float64, z_loss=config.train.z_loss
    )
    sum_replicated_gradients(model.parameters(), mesh)
    return {
        "loss": sum_parts(parts, mesh).loss,
        "norm": float(gradient_norm(model.parameters(), mesh)),
        "targets": targets,
        "gradients": gradients(model),
    }


class _Connected:
    """The meshes of the layouts so far, while their process groups stand: thousands are too many sockets."""

    def __init__(self) -> None:
        self._world: Any = None
        self._meshes: dict[str, Mesh] = {}

    def __call__(self, config: Config) -> Mesh:
        world = dist.group.WORLD if dist.is_initialized() else None
        if world is not self._world:
            self._world, self._meshes = world, {}
        layout = config.parallel.model_dump_json()
        if layout not in self._meshes:
            self._meshes[layout] = mesh_of(config).connect(torch.device("cpu"))
        return self._meshes[layout]


_connected = _Connected()


def _batch(documents: list[list[int]], vocab_size: int, masked: float) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(sum(map(len, documents)))
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in documents])
    length = ids.shape[1]
    begins = np.stack([np.searchsorted(row, row) for row in ids])
    stream = draw.integers(0, vocab_size, (len(ids), length + 1))
    targets = stream[:, 1:].copy()
    targets[:, :-1][ids[:, 1:] != ids[:, :-1]] = IGNORE
    targets[draw.random(targets.shape) < masked] = IGNORE
    return {
        "tokens": stream[:, :-1],
        "targets": targets,
        "positions": np.arange(length) - begins,
        "document_ids": ids,
    }
