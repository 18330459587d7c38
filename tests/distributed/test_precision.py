"""The precision contract, read off a live step in bf16 (docs/parallelism.md)."""

import fnmatch
import math

import pytest
import torch
from layouts import name

FP32, BF16 = torch.float32, torch.bfloat16

CONTRACT = {
    # parameter -> gathered over FSDP, multiplied by `linear`; stored, reduced and optimized in fp32 is all
    "embedding.weight": (FP32, None),
    "head.weight": (FP32, None),
    "*norm.weight": (FP32, None),
    "layers.*.mixer.[xbc]_conv.*": (FP32, None),
    "layers.*.mixer.A_log": (FP32, None),
    "layers.*.mixer.D": (FP32, None),
    "layers.*.mixer.dt_bias": (FP32, None),
    "layers.*.mixer.dt_proj.weight": (FP32, FP32),
    "layers.*.mixer.router.weight": (FP32, FP32),
    "layers.*.mixer.experts.*_proj": (BF16, None),
    "layers.*.mixer.shared.*_proj.weight": (BF16, BF16),
    "layers.*.mixer.[zxbcqkvo]_proj.weight": (BF16, BF16),
    "layers.*.mixer.out_proj.weight": (BF16, BF16),
    "layers.*.mixer.up_proj.weight": (BF16, BF16),
    "layers.*.mixer.gate_proj.weight": (BF16, BF16),
    "layers.*.mixer.down_proj.weight": (BF16, BF16),
    "layers.*.mixer.latent_*_proj.weight": (BF16, BF16),
}


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        {"tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"sp": 2, "tp": 2},
        {"tp": 2, "ep": 2},
        {"sp": 2, "tp": 2, "ep": 2},
    ],
    ids=name,
)
def test_the_contract_in_a_live_step(ranks, tree, layout):
    # Widths of which no two are alike, so that a shape names the product's weight.
    changes = {
        "train.dtype": "bfloat16",
        "model.d_model": 40,
        "model.mamba.num_heads": 12,
        "model.mamba.d_state": 6,
        "model.mamba.head_dim": 16,
        "model.moe.num_experts": 14,
        "model.moe.d_shared": 20,
        "model.moe.latent_dim": 28,
        "model.mlp.d_ff": 56,
    }
    ep = layout.get("ep", 1)
    ranks_a_copy = math.prod(size for axis, size in layout.items() if axis not in ("dp_replicate", "ep"))
    fsdp, efsdp = ranks_a_copy > layout.get("tp", 1), ranks_a_copy > ep
    used = set()
    for rank in ranks("precision", tree(changes, **layout)):
        assert rank["reduced"] == ({FP32} if fsdp or efsdp else set())
        for parameter, stored in rank["stored"].items():
            kind = next(kind for kind in CONTRACT if fnmatch.fnmatchcase(parameter, kind))
            used.add(kind)
            gathered, multiplied = CONTRACT[kind]
            sharded = efsdp if ".experts." in parameter else fsdp
            # Without FSDP nothing is gathered, and what is multiplied is cast where it is.
            assert rank["gathered"][parameter] == (gathered if sharded else FP32), parameter
            assert stored == rank["gradient"][parameter] == FP32, parameter
            assert rank["moments"][parameter] == {FP32}, parameter
            if multiplied is not None:
                assert rank["products"][rank["shapes"][parameter]] == {multiplied}, parameter
    assert used == set(CONTRACT)
