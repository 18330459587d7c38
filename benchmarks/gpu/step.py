"""A training step of a 1.3 B hybrid on drawn tokens: its speed, MFU, peak memory, and where the time goes."""

import gc
import os
from pathlib import Path
from typing import Any

import torch

from plait.pretrain.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, OptimConfig
from plait.pretrain.flops import flops_per_token, peak_flops
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import Packing, build_model
from plait.pretrain.optimizer import build_optimizer

from .setting import Results, Setting
from .timed import measure

BIG = ModelConfig(
    pattern="[M-M-M-M-M-*-M-M-M-M-M-]x2",
    d_model=2048,
    vocab_size=32768,
    tie_embeddings=True,
    mamba=MambaConfig(num_heads=64, head_dim=64, d_state=128, num_groups=8, chunk_size=256),
    attention=AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128),
    mlp=MLPConfig(d_ff=7168),
)
TINY = ModelConfig(
    pattern="M-*",
    d_model=32,
    vocab_size=64,
    mamba=MambaConfig(num_heads=2, head_dim=16, d_state=16, num_groups=1, chunk_size=32),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MLPConfig(d_ff=32),
)
ATTEMPTS = ((4, False), (4, True), (1, True))
"""Sequences, and whether layers are computed again for the backward: the first that fits."""


def run(setting: Setting, results: Results) -> None:
    config, length = (TINY, 40) if setting.tiny else (BIG, 4096)
    dtype = torch.float32 if setting.interpret else torch.bfloat16
    results.write("shape", {"pattern": config.pattern, "d_model": config.d_model, "length": length})
    for kernels in ("triton", "torch"):
        os.environ["PLAIT_KERNELS"] = kernels
        for batch, recompute in ATTEMPTS[-1:] if setting.tiny else ATTEMPTS:
            row: dict[str, Any] = {"kernels": kernels, "batch": batch, "recomputing": recompute}
            try:
                trace = setting.out / "step-trace.json.gz" if kernels == "triton" else None
                row |= _measure(config, setting.device, dtype, batch, length, recompute, trace)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0][:200]
            results.add("steps", row)
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            if "error" not in row:
                break


def _measure(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    recompute: bool,
    trace: Path | None,
) -> dict[str, Any]:
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(config, seed=0, device=device, activation_checkpointing=recompute)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    targets = tokens.roll(-1, 1)
    documents = (torch.arange(length, dtype=torch.int32, device=device) // -(-length // 3)).expand(batch, -1)
    packing = Packing(
        torch.arange(length, device=device).expand_as(tokens),
        documents.contiguous(),
        most=(3, -(-length // 3)),
    )
    counts = StepCounts(tokens.numel(), tokens.numel(), batch)
    losses = []

    def step() -> None:
        loss = compute_loss(model, MicroBatch(tokens, targets, packing), counts, dtype=dtype).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step()
    time = measure(step, device, 5.0)
    per_second = tokens.numel() / time["ms"] * 1e3
    flops = flops_per_token(config, length)
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **time,
        "tokens_per_second": per_second,
        "model_teraflops": per_second * flops / 1e12,
        "mfu": per_second * flops / peak_flops(device, dtype),
        "losses": [losses[0].item(), losses[-1].item()],
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if trace is not None:
        found["kernels_by_time"] = _profile(step, device, trace)
    return found


def _profile(step, device: torch.device, trace: Path) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))

    def own(event: Any) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(own(event) for event in events) or 1.0
    return [
        {"name": event.key[:80], "ms": own(event) / 1e3, "part": own(event) / total} for event in events[:20]
    ]
