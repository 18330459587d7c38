"""torch.compile takes a whole training step, forward and backward, as one graph each.

The backend only traces: what the graph computes is then the same operators, and the bits are compared.
"""

import pytest
import torch
from torch import Tensor

from plait.pretrain.config import ModelConfig
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import Hybrid, Packing, build_model

ROWS, LENGTH = 2, 37


def a_batch() -> MicroBatch:
    tokens = torch.randint(0, 64, (ROWS, LENGTH))
    ids = (torch.rand(ROWS, LENGTH) < 0.1).long().cumsum(1)
    targets = tokens.masked_fill(torch.rand(ROWS, LENGTH) < 0.2, -100)
    return MicroBatch(tokens, targets, Packing(torch.arange(LENGTH).expand(ROWS, -1), ids, most=(16, 64)))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.usefixtures("one_thread")
def test_a_step_is_one_graph(tiny: dict, recomputed: bool) -> None:
    tiny["model"]["vocab_size"] = 64
    tiny["model"]["moe"] |= {"aux_loss": 0.01, "z_loss": 0.001}
    config = ModelConfig.model_validate(tiny["model"])
    model = build_model(config, seed=0, activation_checkpointing=recomputed)
    counts = StepCounts(targets=50, tokens=ROWS * LENGTH, sequences=ROWS)

    def step(model: Hybrid, batch: MicroBatch) -> Tensor:
        return compute_loss(model, batch, counts, dtype=torch.bfloat16, z_loss=1e-4).total

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    # A second batch has other documents, which are no reason to compile again.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            batch = a_batch()
            results = []
            for function in (step, compiled):
                model.zero_grad()
                loss = function(model, batch)
                loss.backward()
                results.append((loss.detach(), *(p.grad for p in model.parameters())))
            for wanted, got in zip(*results, strict=True):
                assert wanted is not None
                assert got is not None
                assert torch.equal(wanted, got)
    torch._dynamo.reset()
