"""What the mixers of a model give for two batches that differ in one token."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.pretrain.config_file import parse_config
from plait.pretrain.micro_batches import cut_batch
from plait.pretrain.model import build_model
from plait.pretrain.ranks import mesh_of


def run(
    tree: dict[str, Any], tokens: list[list[int]], document_ids: list[list[int]], changed: list[list[int]]
) -> dict[str, Any]:
    """Each layer's mixer's output, before and after, and the tokens that it is of.

    Args:
        tokens, changed: two batches (B, L).
        document_ids: (B, L), from 0 in each row.
    """
    config = parse_config(tree, "test")
    mesh = mesh_of(config).connect(torch.device("cpu"))
    model = build_model(
        config.model, seed=3, dtype=getattr(torch, config.train.dtype), mesh=mesh
    ).requires_grad_(False)
    before, after = (
        _outputs(model, mesh, np.array(batch), np.array(document_ids)) for batch in (tokens, changed)
    )
    length = len(tokens[0])
    first = mesh.shard_length(length) * mesh.place("sp")
    each = mesh.shard_length(length) // mesh.tp.size
    first += each * mesh.tp.place
    return {"before": before, "after": after, "first": first, "end": min(length, first + each)}


def _outputs(model: Any, mesh: Any, tokens: np.ndarray, ids: np.ndarray) -> list[Tensor]:
    length = tokens.shape[1]
    part = slice(*mesh.tokens(length))
    begins = np.stack([np.searchsorted(row, row) for row in ids])
    arrays = {
        "tokens": tokens[:, part],
        "targets": tokens[:, part],
        "positions": (np.arange(length) - begins)[:, part],
        "document_ids": ids,
    }
    (micro,) = cut_batch(
        arrays,
        mesh,
        length=length,
        rows=len(tokens),
        size=None,
        device=torch.device("cpu"),
        isolate_documents=True,
    )
    found: list[Tensor] = []
    hooks = [
        layer.mixer.register_forward_hook(lambda _, __, output: found.append(output[0].clone()))
        for layer in model.layers
    ]
    model(micro.tokens, micro.packing)
    for hook in hooks:
        hook.remove()
    return found
