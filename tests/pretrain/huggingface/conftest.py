"""Runs with one checkpoint and no training: weights at random, all of them far from where they begin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from plait.data.plan import Plan, open_blend
from plait.errors import UserError
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config_file import parse_config
from plait.pretrain.huggingface import import_folder
from plait.pretrain.model import Hybrid, build_model
from plait.pretrain.optimizer import build_optimizer
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.train_state import TrainState

SaveRun = Callable[..., tuple[Path, Hybrid]]


@pytest.fixture(autouse=True)
def _small(one_thread):
    """The models are so small that a second thread only costs."""


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Matrices large enough for every path to matter; no norm weight is 1, no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("dt_bias"):
            tensor.copy_(noise - 2)
            # A step size of 3e-4, below the least that transformers takes by default.
            tensor[0] = -8.0
        elif name.endswith(("A_log", ".D")) or "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("correction_bias"):
            tensor.copy_(0.2 * noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


@pytest.fixture
def save_run(tmp_path: Path) -> SaveRun:
    """Writes a run's folder with a checkpoint at each of some steps; returns it and the last model."""

    def save(tree: dict[str, Any], steps: tuple[int, ...] = (4,)) -> tuple[Path, Hybrid]:
        config = parse_config(tree, "test")
        folder = RunFolder(config.run.dir)
        folder.prepare(config)
        dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
        model = build_model(config.model, seed=config.run.seed, dtype=dtype)
        sources, _ = open_blend(config.data.blend)
        plan = Plan.start(sources, seed=config.run.seed, seq_len=config.data.seq_len)
        checkpoints = Checkpoints(folder.checkpoints)
        for step in steps:
            shake(model, seed=7)
            batch = config.train.batch_size
            state = TrainState(
                model,
                build_optimizer(model, config.optim),
                plan,
                step=step,
                samples=step * batch,
                tokens=step * batch * config.data.seq_len,
            )
            checkpoints.save(step, state.tensors(), state.facts(config))
        return folder.path, model

    return save


@pytest.fixture
def four(tiny) -> dict:
    """All four letters, twice M, so that states, keys and experts follow one another."""
    tiny["model"]["pattern"] = "M*-EM"
    tiny["train"]["batch_size"] = 2
    return tiny


SHAPES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "routed_scaling_factor": 2.5,
    "time_step_min": 1e-30,
}
"""A small nemotron_h of all four kinds of layers, with an odd vocabulary."""

LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}

Saved = tuple[Path, dict[str, torch.Tensor], Any]
SaveModel = Callable[..., Saved]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Writes a model of transformers, weights at random, in one of three dialects; returns the folder,
    the tensors in its files, and the model."""

    def save(
        dialect: str = "transformers", dtype: torch.dtype = torch.float32, name: str = "hf", **shapes: Any
    ) -> Saved:
        config = NemotronHConfig(**(SHAPES | shapes))
        theirs = NemotronHForCausalLM(config)
        theirs.set_experts_implementation("eager")
        shake(theirs, seed=11)
        folder = tmp_path / name
        nn.Module.to(theirs, dtype)
        theirs.save_pretrained(folder, max_shard_size="40KB" if dialect == "nvidia" else "1GB")
        if dialect == "nvidia":
            speak_nvidia(folder)
        if dialect == "in memory":
            save_file(theirs.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder, _tensors_of(folder), nn.Module.float(theirs)

    return save


def speak_nvidia(folder: Path) -> None:
    """config.json as NVIDIA's releases have it: the layers as a pattern, an infinity as JSON has none."""
    tree = json.loads((folder / "config.json").read_text())
    types = tree.pop("layers_block_type")
    tree |= {
        "hybrid_override_pattern": "".join(LETTERS[kind] for kind in types),
        "num_hidden_layers": len(types),
        "time_step_limit": [0.0, float("inf")],
        "torch_dtype": tree.pop("dtype"),
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(tree))


def _tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder's files, by the names and with the dtypes that they have there."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(name="tensors_of")
def _the_tensors_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    return _tensors_of


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The line with which an import ends, without the folder's path; nothing else may be there after it."""

    def refuse(folder: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            import_folder(folder, tmp_path / "run", **options)
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(folder), "HF")

    return refuse
