"""Model FLOPs of a token, and the machine's peak: what model FLOPs utilisation (MFU) is made of.

Counted are the matrix products that the model's mathematics asks for, two a multiply-add, forward
once and backward twice; what is recomputed or padded is not.
"""

import time
from functools import cache

import torch

from .config import ModelConfig

__all__ = ["flops_per_token", "peak_flops"]

DENSE_BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "MI300X": 1307e12,
}
"""Vendors' dense bf16 figures, by a part of the device's name; the first that matches."""


PEAK_SECONDS = 0.4
"""How long a device without a known figure is timed."""


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `seq_len`.

    Attention is counted as causal: a token meets half the sequence. SSD is counted in its chunked
    form, with its chunk length.
    """
    D = config.d_model
    total = 2 * D * config.vocab_size
    for letter in config.layers:
        if letter == "M" and config.mamba is not None:
            m = config.mamba
            inner, shared = m.d_inner, m.num_groups * m.d_state
            projections = D * (2 * inner + 2 * shared + m.num_heads) + inner * D
            convolution = (inner + 2 * shared) * m.d_conv
            scan = 2 * inner * m.d_state + m.chunk_size / 2 * (shared + inner)
            total += 2 * (projections + convolution + scan)
        elif letter == "*" and config.attention is not None:
            a = config.attention
            queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
            total += 2 * (2 * D * queries + 2 * D * keys + 2 * queries * seq_len / 2)
        elif letter == "-" and config.mlp is not None:
            matrices = 3 if config.mlp.activation == "swiglu" else 2
            total += 2 * matrices * D * config.mlp.d_ff
        elif letter == "E" and config.moe is not None:
            e = config.moe
            matrices = 3 if e.activation == "swiglu" else 2
            width = e.latent_dim or D
            latent = 2 * D * width if e.latent_dim else 0
            routed = e.top_k * matrices * width * e.d_expert
            total += 2 * (D * e.num_experts + routed + matrices * D * e.d_shared + latent)
    return 3.0 * total


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against.

    A known GPU has its vendor's figure for bf16. Any other device is timed on a square product of the
    dtype, once a process, the best of half a second.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in DENSE_BF16_PEAKS.items():
            if part in name:
                return peak
    n = 4096 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    # Long enough to find a moment when nobody else wants the machine.
    while time.perf_counter() - began < PEAK_SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
