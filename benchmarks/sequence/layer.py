"""One Mamba-2 layer on this rank's shard, forward and backward, by each form: bytes, seconds, exactness.

Shapes: B batch, T tokens of this rank, L of the sequence, D model width.
"""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.parallel.axes import AXES
from plait.parallel.mesh import Mesh
from plait.pretrain.config import MambaConfig, ModelConfig
from plait.pretrain.model import Packing, build_model
from plait.pretrain.model.layers import Kept
from plait.pretrain.model.mamba2 import Mamba2

from .over_heads import mamba_over_heads
from .volumes import FORMS, STATE_FORMS, MambaShape, layer_sent

__all__ = ["exact_job", "job", "recompute_job", "sequence_mesh"]


def sequence_mesh(rank: int, ranks: int) -> Mesh:
    """All ranks on sp."""
    sizes = dict.fromkeys(AXES, 1) | {"sp": ranks}
    return Mesh.create(sizes, rank=rank, world_size=ranks).connect(torch.device("cpu"))


class Layer:
    """The same layer by any form; its parameters are whole on every rank."""

    def __init__(self, shape: MambaShape, mesh: Mesh, dtype: torch.dtype) -> None:
        config = ModelConfig(
            pattern="M",
            d_model=shape.d_model,
            vocab_size=8,
            mamba=MambaConfig(
                num_heads=shape.heads,
                head_dim=shape.head_dim,
                d_state=shape.d_state,
                num_groups=shape.groups,
                d_conv=shape.taps,
                chunk_size=64,
            ),
        )
        mixer = build_model(config, seed=0, dtype=dtype, mesh=mesh).layers[0].mixer
        assert isinstance(mixer, Mamba2)
        self.mixer, self.mesh = mixer, mesh

    def forward(self, form: str, x_BTD: Tensor, *, recompute: bool = False) -> Tensor:
        mesh = replace(self.mesh, state_exchange=form) if form in STATE_FORMS else self.mesh
        self.mixer.mesh = mesh
        kept = Kept(mesh)

        def run(x: Tensor) -> Tensor:
            with mesh.layer(0):
                if form in STATE_FORMS:
                    return self.mixer(x, Packing(torch.zeros(x.shape[:2]), None), kept)[0]
                return mamba_over_heads(self.mixer, x, mesh.sp, send_z=form == "all-to-all")

        return checkpoint(run, x_BTD, use_reentrant=False) if recompute else run(x_BTD)

    def step(self, form: str, x_BTD: Tensor, grad_BTD: Tensor, *, recompute: bool = False) -> None:
        """Forward and backward."""
        self.mixer.zero_grad()
        x_BTD = x_BTD.detach().requires_grad_()
        self.forward(form, x_BTD, recompute=recompute).backward(grad_BTD)


def job(
    rank: int, ranks: int, *, shape: dict[str, int], lengths: list[int], turns: dict[str, int]
) -> list[dict[str, Any]]:
    """A record for each length and form: bytes, checked against the closed formulas, and for each turn
    the seconds that passed and those that this rank's processor worked.

    Args:
        turns: length -> how often it is timed.
    """
    sizes, mesh = MambaShape(**shape), sequence_mesh(rank, ranks)
    layer = Layer(sizes, mesh, torch.float32)
    records = []
    for length in lengths:
        torch.manual_seed(rank)
        x, grad = (torch.randn(sizes.batch, length // ranks, sizes.d_model) for _ in range(2))
        by_form = {form: _bytes(layer, form, sizes, x, grad, length) for form in FORMS}
        for _ in range(turns.get(str(length), 0)):
            for form in FORMS:
                dist.barrier()
                start, worked = time.perf_counter(), time.process_time()
                layer.step(form, x, grad)
                by_form[form]["worked"].append(time.process_time() - worked)
                by_form[form]["seconds"].append(time.perf_counter() - start)
        records += by_form.values()
    return records


def _bytes(
    layer: Layer, form: str, shape: MambaShape, x: Tensor, grad: Tensor, length: int
) -> dict[str, Any]:
    axis = layer.mesh.sp
    expected = layer_sent(form, shape, length, axis.size, axis.place)
    sent = _sent(layer, form, x, grad, recompute=False)
    assert sent == expected | {"recompute": 0}, f"{form}, L {length}: {sent}, by formula {expected}"
    return {"form": form, "length": length, **expected, "seconds": [], "worked": []}


def _sent(layer: Layer, form: str, x: Tensor, grad: Tensor, *, recompute: bool) -> dict[str, int]:
    with layer.mesh.record() as ledger:
        layer.step(form, x, grad, recompute=recompute)
    directions = ("forward", "backward", "recompute")
    sent = {direction: ledger.sent(layer=0, direction=direction) for direction in directions}
    assert ledger.sent() == sum(sent.values()), "the ledger holds more than the layer's bytes"
    return sent


def recompute_job(rank: int, ranks: int, *, shape: dict[str, int], length: int) -> dict[str, dict[str, int]]:
    """Form -> direction -> bytes of a layer whose forward is computed again in the backward."""
    sizes, mesh = MambaShape(**shape), sequence_mesh(rank, ranks)
    layer = Layer(sizes, mesh, torch.float32)
    x, grad = (torch.randn(sizes.batch, length // ranks, sizes.d_model) for _ in range(2))
    by_form = {}
    for form in FORMS:
        by_form[form] = _sent(layer, form, x, grad, recompute=True)
        once = layer_sent(form, sizes, length, ranks, rank)
        expected = once | {"recompute": 0 if form in STATE_FORMS else once["forward"]}
        assert by_form[form] == expected, f"{form}, computed again: {by_form[form]}, not {expected}"
    return by_form


def exact_job(rank: int, ranks: int, *, shape: dict[str, int], length: int) -> dict[str, float]:
    """Form -> the largest difference from one rank in float64: of the output and of every gradient, each
    relative to the largest number in it."""
    sizes, mesh = MambaShape(**shape), sequence_mesh(rank, ranks)
    generator = torch.Generator().manual_seed(0)
    whole = (sizes.batch, length, sizes.d_model)
    x_BLD, grad_BLD = (torch.randn(whole, generator=generator, dtype=torch.float64) for _ in range(2))
    alone = Layer(sizes, Mesh.single(), torch.float64)
    expected = _results(alone, "ring", x_BLD, grad_BLD)
    layer = Layer(sizes, mesh, torch.float64)
    first, end = mesh.tokens(length)
    worst = {}
    for form in FORMS:
        got = _results(layer, form, x_BLD[:, first:end], grad_BLD[:, first:end])
        errors = []
        for name, tensor in got.items():
            if name in ("y", "x"):
                want = expected[name][:, first:end]
            else:
                dist.all_reduce(tensor)
                want = expected[name]
            errors.append(float((tensor - want).abs().max() / want.abs().max()))
        worst[form] = max(errors)
        assert worst[form] < 1e-10, f"{form} on {ranks} ranks differs from one rank by {worst[form]:.1e}"
    return worst


def _results(layer: Layer, form: str, x_BTD: Tensor, grad_BTD: Tensor) -> dict[str, Tensor]:
    layer.mixer.zero_grad()
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = layer.forward(form, x_BTD)
    y_BTD.backward(grad_BTD)
    results = {"y": y_BTD.detach(), "x": x_BTD.grad}
    results |= {name: parameter.grad for name, parameter in layer.mixer.named_parameters()}
    missing = [name for name, tensor in results.items() if tensor is None]
    assert not missing, f"{form}: no gradient of {missing}"
    return {name: tensor for name, tensor in results.items() if tensor is not None}
