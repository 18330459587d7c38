"""Five steps of a tiny model by the Triton forms, interpreted; test_training_triton.py runs this file."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from plait.kernels.forms import form_of
from plait.parallel.mesh import Mesh
from plait.pretrain.config import ModelConfig
from plait.pretrain.loss import StepCounts, compute_loss
from plait.pretrain.micro_batches import Arrays, cut_batch
from plait.pretrain.model import build_model

STEPS, LENGTH = 5, 10
MODEL = {
    "pattern": "M*-E",
    "d_model": 16,
    "vocab_size": 40,
    "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16, "num_groups": 1, "chunk_size": 16},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "mlp": {"d_ff": 24},
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8, "activation": "swiglu"},
}


def losses(form: str, mesh: Mesh) -> list[float]:
    """Each step's loss, over all ranks of the mesh."""
    assert form_of(torch.zeros(1)) == form
    model = build_model(ModelConfig.model_validate(MODEL), seed=0, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    counts = StepCounts(targets=LENGTH - 2, tokens=LENGTH, sequences=1)
    found = []
    for step in range(STEPS):
        (batch,) = cut_batch(
            arrays(step, *mesh.tokens(LENGTH)),
            mesh,
            length=LENGTH,
            rows=1,
            size=None,
            device=torch.device("cpu"),
            isolate_documents=True,
        )
        loss = compute_loss(model, batch, counts, dtype=torch.float32, z_loss=1e-4).total
        optimizer.zero_grad()
        loss.backward()
        whole = loss.detach().clone()
        if mesh.world_size > 1:
            for tensor in (whole, *(p.grad for p in model.parameters())):
                dist.all_reduce(tensor)
        optimizer.step()
        found.append(whole.item())
    return found


def arrays(step: int, first: int, end: int) -> Arrays:
    """A step's sequence, of which a rank has the tokens from `first` to `end`."""
    draw = np.random.default_rng(step)
    tokens, targets = draw.integers(0, 40, (2, 1, LENGTH))
    targets[0, 4:6] = -100
    # One document is in both halves of the sequence.
    document_ids = np.repeat([[0, 1, 2, 3]], [1, 2, 4, 3], axis=1).astype(np.int32)
    part = slice(first, end)
    return {
        "tokens": tokens[:, part],
        "targets": targets[:, part],
        "positions": np.arange(LENGTH)[None, part],
        "document_ids": document_ids,
    }


def of_rank(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = Mesh.create({"sp": 2}, rank=rank, world_size=2).connect(torch.device("cpu"))
    torch.save(losses("triton", mesh), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_forms_train_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where a sequence is cut over two ranks, and its states leave between two kernels."""
    monkeypatch.setenv("PLAIT_KERNELS", "torch")
    wanted = losses("torch", Mesh.single())
    assert len(set(wanted)) == STEPS
    monkeypatch.setenv("PLAIT_KERNELS", "triton")
    torch.testing.assert_close(losses("triton", Mesh.single()), wanted, rtol=1e-5, atol=0)
    # Forks: importing torch anew would take longer than the steps.
    mp.start_processes(of_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted, rtol=1e-5, atol=0)
