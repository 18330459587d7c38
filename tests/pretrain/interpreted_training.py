"""Five steps of a tiny model by the Triton forms, in the interpreter; test_training_triton.py runs this file."""

import time

import pytest
import torch

from plait.kernels.forms import form_of
from plait.pretrain.config import ModelConfig
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import Packing, build_model

STEPS, LENGTH = 5, 21
MODEL = {
    "pattern": "M*-E",
    "d_model": 16,
    "vocab_size": 40,
    "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16, "num_groups": 1, "chunk_size": 16},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "mlp": {"d_ff": 24},
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8, "activation": "swiglu"},
}


def losses(form: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setenv("PLAIT_KERNELS", form)
    assert form_of(torch.zeros(1)) == form
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(MODEL), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    counts = StepCounts(targets=LENGTH, tokens=LENGTH, sequences=1)
    found = []
    for _ in range(STEPS):
        tokens, targets = torch.randint(0, 40, (2, 1, LENGTH)).unbind()
        targets[0, :3] = -100
        starts = torch.rand(1, LENGTH) < 0.15
        starts[0, 0] = False
        packing = Packing(torch.arange(LENGTH)[None], starts.long().cumsum(1))
        batch = MicroBatch(tokens, targets, packing)
        loss = compute_loss(model, batch, counts, dtype=torch.float32, z_loss=1e-4).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_forms_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.process_time()
    wanted = losses("torch", monkeypatch)
    assert len(set(wanted)) == STEPS
    got = losses("triton", monkeypatch)
    print(got, wanted, time.process_time() - started)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
