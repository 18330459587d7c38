"""Runs with one checkpoint and no training: weights at random, all of them far from where they begin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.data.mixture import Plan, open_blend
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config_file import parse_config
from plait.pretrain.model import Hybrid, build_model
from plait.pretrain.optimizer import build_optimizer
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.train_state import TrainState

SaveRun = Callable[..., tuple[Path, Hybrid]]


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def shake(model: Hybrid) -> None:
    """Matrices large enough for every path to matter; no norm weight is 1, no bias is 0."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("dt_bias"):
            tensor.copy_(noise - 2)
            # A step size of 3e-4, below the least that transformers takes by default.
            tensor[0] = -8.0
        elif name.endswith(("A_log", "D")) or "norm" in name:
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
            shake(model)
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
