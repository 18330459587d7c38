"""The layer on one rank, forward and backward: plait's, transformers', and an MLP of as many products.

plait and transformers get the same weights, which bf16 holds exactly. In bf16 plait keeps fp32 parameters and
casts them as it does in training; transformers' are bf16. Of its implementations `batched_mm` is left out: it
copies an expert's matrices for every row, gigabytes at these sizes.

Shapes: B batch, L tokens of a sequence, T = B L tokens, D model width.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.parallel.mesh import Mesh
from plait.pretrain.config import MLPConfig, ModelConfig
from plait.pretrain.model import Packing, build_model
from plait.pretrain.model.layers import Kept
from plait.pretrain.model.mlp import MLP
from plait.pretrain.model.moe import MoE

from .shapes import Shape

__all__ = ["FORMS", "job", "memory_job"]

TRANSFORMERS = ("transformers, grouped_mm", "transformers, eager")
FORMS = ("plait", *TRANSFORMERS, "dense MLP")

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the difference, relative to the largest number: orders of sums in fp32, roundings in bf16."""


class Form:
    """
    Attributes:
        parameters: in the same order for all forms of one layer.
    """

    def __init__(self, name: str, shape: Shape, dtype: torch.dtype) -> None:
        if name == "dense MLP":
            module = _dense(shape)
            self._run: Callable[[Tensor], Tensor] = lambda x: module(x, _packing(x), Kept(Mesh.single()))[0]
            self.parameters = list(module.parameters())
            return
        ours = shape.layer()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.copy_(parameter.bfloat16())
        if name == "plait":
            self._run = lambda x: ours(x, _packing(x), Kept(ours.mesh))[0]
            self.parameters = _ordered(ours)
        else:
            theirs = _transformers(shape, implementation=name.split(", ")[1])
            with torch.no_grad():
                for mine, parameter in zip(_ordered(ours), _ordered(theirs), strict=True):
                    parameter.copy_(mine)
            theirs.to(dtype)
            self._run, self.parameters = theirs, _ordered(theirs)

    def step(self, x_BLD: Tensor, grad_BLD: Tensor) -> list[Tensor]:
        """The output, the input's gradient and the parameters'."""
        y_BLD = self._run(x_BLD)
        return [y_BLD.detach(), *torch.autograd.grad(y_BLD, [x_BLD, *self.parameters], grad_BLD)]


def job(
    rank: int, ranks: int, *, shapes: Sequence[dict[str, Any]], tokens: int, dtypes: Sequence[str], turns: int
) -> list[dict[str, Any]]:
    """A record for each dtype, shape and form: the seconds of each turn that passed and those that the
    processor worked, and, where there is one to compare with, the difference from plait."""
    records = []
    for dtype in dtypes:
        for sizes in shapes:
            shape = Shape(**sizes)
            x, grad = _inputs(shape, tokens, getattr(torch, dtype))
            forms = {name: Form(name, shape, x.dtype) for name in FORMS}
            by_form: dict[str, dict[str, Any]] = {
                name: {"dtype": dtype, "shape": sizes, "form": name, "seconds": [], "worked": []}
                for name in FORMS
            }
            for name in TRANSFORMERS:
                by_form[name]["difference"] = _difference(forms[name], forms["plait"], x, grad)
            for turn in range(1 + turns):
                for name, form in forms.items():
                    start, worked = time.perf_counter(), time.process_time()
                    form.step(x, grad)
                    worked, seconds = time.process_time() - worked, time.perf_counter() - start
                    if turn > 0:
                        by_form[name]["worked"].append(worked)
                        by_form[name]["seconds"].append(seconds)
            records += by_form.values()
    return records


def _inputs(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and the output's gradient, (1, T, D)."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(1, tokens, shape.d_model, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), grad


def _difference(form: Form, other: Form, x_BLD: Tensor, grad_BLD: Tensor) -> float:
    """The largest difference of outputs and gradients, each relative to the largest number in it."""
    worst = 0.0
    for got, want in zip(form.step(x_BLD, grad_BLD), other.step(x_BLD, grad_BLD), strict=True):
        want = want.float()
        worst = max(worst, float((got.float() - want).abs().max() / want.abs().max()))
    assert worst < LIMITS[x_BLD.dtype], f"the forms differ by {worst:.1e}"
    return worst


def memory_job(
    rank: int, ranks: int, *, name: str, shapes: Sequence[dict[str, Any]], tokens: int, dtype: str
) -> list[int]:
    """For each shape the bytes that steps have above weights and inputs, at the most."""
    peaks = []
    for sizes in shapes:
        shape = Shape(**sizes)
        form = Form(name, shape, getattr(torch, dtype))
        x, grad = _inputs(shape, tokens, getattr(torch, dtype))
        # What libraries set up once is no part of a step.
        form.step(x, grad)
        before = _status("VmRSS")
        # The peak is the kernel's, from here on.
        Path("/proc/self/clear_refs").write_text("5")
        form.step(x, grad)
        peaks.append(_status("VmHWM") - before)
    return peaks


def _status(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def _packing(x_BLD: Tensor) -> Packing:
    return Packing(torch.arange(x_BLD.shape[1]).expand(x_BLD.shape[:2]), None)


def _dense(shape: Shape) -> MLP:
    config = ModelConfig(pattern="-", d_model=shape.d_model, vocab_size=8, mlp=MLPConfig(d_ff=shape.dense))
    mixer = build_model(config, seed=0).layers[0].mixer
    assert isinstance(mixer, MLP)
    return mixer


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _transformers(shape: Shape, implementation: str) -> nn.Module:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = NemotronHConfig(
        hidden_size=shape.d_model,
        n_routed_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.d_expert,
        moe_shared_expert_intermediate_size=shape.d_shared or 1,
        moe_latent_size=shape.latent_dim,
        mlp_hidden_act="relu2",
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    config._experts_implementation = implementation
    layer = NemotronHMoE(config).train()
    if not shape.d_shared:
        # It has one always; what is left of it is the addition.
        layer.set_submodule("shared_experts", _Nothing())
    return layer


def _ordered(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters, those of plait and of transformers in one order."""
    ours = isinstance(layer, MoE)
    names = dict(layer.named_parameters())
    spelled = {
        "router.weight": "gate.weight",
        "experts.up_proj": "experts.up_proj",
        "experts.down_proj": "experts.down_proj",
        "shared.up_proj.weight": "shared_experts.up_proj.weight",
        "shared.down_proj.weight": "shared_experts.down_proj.weight",
        "latent_in_proj.weight": "fc1_latent_proj.weight",
        "latent_out_proj.weight": "fc2_latent_proj.weight",
    }
    ordered = [mine if ours else theirs for mine, theirs in spelled.items()]
    assert names.keys() <= set(ordered), f"no place for {names.keys() - set(ordered)}"
    return [names[name] for name in ordered if name in names]
