"""The ledger of one step, with marks at the computations that are to hide what is sent."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from plait.parallel.fsdp import set_last_micro_batch
from plait.parallel.mesh import Mesh
from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import compute_loss
from plait.pretrain.model.mamba2 import Mamba2
from plait.pretrain.model.moe import MoE
from plait.pretrain.optimizer import clip_gradients
from plait.pretrain.trainer import Trainer

MARKED = {
    Mamba2: ("x_proj", "b_proj", "z_proj", "c_proj"),
    MoE: ("latent_in_proj", "shared.up_proj", "shared.down_proj"),
}
"""Projections of a layer, in the order of a forward."""


def run(tree: dict[str, Any]) -> dict[str, Any]:
    """Entries and marks of the step, the places in the order of events where each micro-batch's backward
    begins, and the layers."""
    trainer = Trainer(parse_config(tree, "test"))
    config, model, mesh = trainer.config, trainer.state.model, trainer.mesh
    for index, layer in enumerate(model.layers):
        mixer = layer.get_submodule("mixer")
        inside = dict(mixer.named_modules())
        for name in MARKED.get(type(mixer), ()):
            if name in inside:
                _mark(inside[name], f"{index}.{name}", mesh)
    with trainer._loader() as loader:
        batch, _ = loader.next()
    counts = trainer._count(batch)
    micro_batches = trainer.micro_batches(batch)
    with mesh.record() as ledger:
        for number, micro in enumerate(micro_batches):
            set_last_micro_batch(model, micro is micro_batches[-1])
            ledger.mark(f"forward {number}")
            loss = compute_loss(model, micro, counts, dtype=trainer.dtype).total
            ledger.mark(f"backward {number}")
            loss.backward()
            ledger.mark(f"end {number}")
        clip_gradients(model, mesh, config.optim.clip)
    return {
        "entries": [asdict(entry) for entry in ledger.entries],
        "marks": [asdict(mark) for mark in ledger.marks],
        "micro_batches": len(micro_batches),
        "layers": config.model.layers,
    }


def _mark(module: nn.Module, label: str, mesh: Mesh) -> None:
    """Begin and end of a module's forward, and of its backward."""

    def note(what: str, direction: Any = None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if mesh.sp.ledger is not None:
                mesh.sp.ledger.mark(f"{label} {what}", direction)

        return hook

    module.register_forward_pre_hook(note("begins"))
    module.register_forward_hook(note("ends"))
    module.register_full_backward_pre_hook(note("begins", "backward"))
    module.register_full_backward_hook(note("ends", "backward"))
