"""Model FLOPs against what torch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.pretrain.config_file import parse_config
from plait.pretrain.flops import flops_per_token, peak_flops
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import Packing, build_model


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "M*-E"])
@pytest.mark.parametrize("options", ["plain", "gated and latent"])
def test_formula_is_what_the_counter_sees(tiny, pattern, options):
    if options != "plain":
        tiny["model"]["mlp"]["activation"] = "swiglu"
        tiny["model"]["moe"] |= {"activation": "swiglu", "latent_dim": 12}
    tiny["model"]["pattern"] = pattern
    config = parse_config(tiny, "test").model
    model = build_model(config, seed=0)
    length = 64
    tokens = torch.randint(320, (2, length))
    documents = torch.zeros(2, length, dtype=torch.int32)
    batch = MicroBatch(tokens, tokens, Packing(torch.arange(length).expand(2, -1), documents))
    with FlopCounterMode(display=False) as counter:
        compute_loss(model, batch, StepCounts(128, 128, 2), dtype=torch.float32).total.backward()
    # The counter misses what is no matrix product (the convolution), and counts what the backward
    # computes again; the formula's halves (causal halves of tiles and scores) are exact only in the limit.
    expected = flops_per_token(config, length) * 128
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.12)


def test_an_unknown_device_is_timed():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e9
