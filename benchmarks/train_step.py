"""A whole training step against transformers' NemotronH: forward, backward, AdamW, at equal weights.

    python benchmarks/train_step.py [--dtype float32 bfloat16] [--d_model 256] [--length 2048] [--turns 7]

transformers runs as its users run it: its own loss from whole logits, its default attention and experts,
the optimizer of torch (fused for both); in bf16 its parameters are bf16, while plait keeps fp32 masters.
Time is in turns within one process; memory is each one's peak resident set in a process of its own, above
what stands there before the model is built. The last columns say what plait's step takes as a multiple of its
matrix products alone, and of those and torch's attention, which is products too: the floors that no kernel
beside them can lower.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from table_rows import heading, line, median_ratio
from timing import machine, take_turns

from plait.pretrain.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig, OptimConfig
from plait.pretrain.huggingface.config import config_json
from plait.pretrain.huggingface.names import join, tensor_map
from plait.pretrain.loss import MicroBatch, StepCounts, compute_loss
from plait.pretrain.model import Hybrid, Packing, build_model
from plait.pretrain.optimizer import build_optimizer

RIVALS = ("plait", "plait, recomputing", "transformers")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::_grouped_mm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def parser(description: str | None, turns: int) -> argparse.ArgumentParser:
    """The model, the batch and how often."""
    words = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    words.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    words.add_argument("--pattern", default="M-M*ME")
    sizes = (("d_model", 256), ("length", 2048), ("batch", 2), ("vocabulary", 8192), ("turns", turns))
    for name, value in sizes:
        words.add_argument(f"--{name}", type=int, default=value)
    return words


def size(args: argparse.Namespace) -> str:
    """The model and the batch in a line."""
    return f"pattern {args.pattern}, D {args.d_model}, B {args.batch}, L {args.length}, V {args.vocabulary}"


def shape(args: argparse.Namespace) -> ModelConfig:
    D = args.d_model
    return ModelConfig(
        pattern=args.pattern,
        d_model=D,
        vocab_size=args.vocabulary,
        mamba=MambaConfig(num_heads=D // 32, head_dim=64, d_state=64, num_groups=1, chunk_size=64),
        attention=AttentionConfig(num_heads=D // 64, num_kv_heads=D // 128, head_dim=64),
        mlp=MLPConfig(d_ff=4 * D),
        moe=MoEConfig(num_experts=8, top_k=2, d_expert=D, d_shared=D, scaling=1.5),
    )


def plait_step(args: argparse.Namespace, dtype: torch.dtype, *, recompute: bool) -> Callable[[], float]:
    model = build_model(shape(args), seed=0, device=args.device, activation_checkpointing=recompute)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    tokens, targets = batch(args)
    packing = Packing(torch.arange(args.length, device=args.device).expand_as(tokens), None)
    counts = StepCounts(int((targets != -100).sum()), tokens.numel(), tokens.shape[0])

    def step() -> float:
        parts = compute_loss(model, MicroBatch(tokens, targets, packing), counts, dtype=dtype)
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return parts.total.item()

    return step


def transformers_step(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], float]:
    import transformers

    transformers.logging.set_verbosity_error()

    config = shape(args)
    tree = config_json(config, None, max_positions=args.length, dtype="float32")
    tree["hybrid_override_pattern"] = config.layers
    theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**tree))
    load(theirs, build_model(config, seed=0))
    theirs = theirs.to(args.device, dtype).train()
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens, targets = batch(args)
    # Its loss shifts by itself; ours are given shifted.
    labels = torch.cat([tokens[:, :1], targets[:, :-1]], dim=1)

    def step() -> float:
        loss = theirs(tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def load(theirs: torch.nn.Module, ours: Hybrid) -> None:
    """Give transformers' model plait's weights, through the export's own table of names."""
    state, tensors = theirs.state_dict(), ours.state_dict()
    experts: dict[str, list[torch.Tensor]] = {}
    for entry in tensor_map(ours.config):
        name = entry.name.replace("backbone.", "model.")
        if ".experts." in name:
            stack, _, rest = name.partition(".experts.")
            key = f"{stack}.experts.{rest.split('.')[1]}"
            experts.setdefault(key, []).append(join(entry, tensors))
        else:
            state[name].copy_(join(entry, tensors))
    for key, parts in experts.items():
        state[key].copy_(torch.stack(parts))


def batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocabulary, (args.batch, args.length), generator=generator).to(args.device)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    return tokens, targets


def make(name: str, args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], float]:
    if name == "transformers":
        return transformers_step(args, dtype)
    return plait_step(args, dtype, recompute=name.endswith("recomputing"))


def above_its_floors(step: Callable[[], float], turns: int) -> tuple[float, float]:
    """A step's time over that of its products, and of its products and attention; medians over turns."""
    from torch.profiler import ProfilerActivity, profile

    steps, products, both = [], [], []
    for _ in range(turns):
        # Only the long operators are taken from the profile: it lengthens the thousands of short ones.
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        products.append(sum(times.get(name, 0.0) for name in PRODUCTS))
        both.append(products[-1] + sum(times.get(name, 0.0) for name in (ATTENTION, f"{ATTENTION}_backward")))
        start = time.perf_counter()
        step()
        steps.append(time.perf_counter() - start)
    return median_ratio(steps, products), median_ratio(steps, both)


def memory(name: str, args: argparse.Namespace, dtype: str) -> float:
    """Peak megabytes of three steps, in a process of their own."""
    words = ["--memory-of", name, "--dtype", dtype]
    for key in ("d_model", "length", "batch", "vocabulary", "pattern", "device"):
        words += [f"--{key}={getattr(args, key)}"]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True, cwd="/"
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_megabytes(name: str, args: argparse.Namespace) -> float:
    import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401  (so that both stand on the same ground)

    if args.device == "cuda":
        step = make(name, args, getattr(torch, args.dtype[0]))
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 1e6
    before = _status("VmRSS")
    step = make(name, args, getattr(torch, args.dtype[0]))
    # What stood while the weights were made and copied is no part of a step.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """Megabytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1e3


def main() -> None:
    words = parser(__doc__, turns=7)
    words.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = words.parse_args()
    if args.memory_of:
        print(json.dumps(peak_megabytes(args.memory_of, args)))
        return

    print(machine("transformers"))
    print(f"\n{size(args)}; medians of {args.turns} turns\n")
    columns = (
        "step ms",
        "plait is faster by",
        "peak MB",
        "of transformers'",
        "of its products",
        "and attention",
    )
    print(*heading("dtype", "", *columns), sep="\n")
    for name in args.dtype:
        dtype = getattr(torch, name)
        steps = {rival: make(rival, args, dtype) for rival in RIVALS}
        losses = [step() for step in steps.values()]
        assert max(losses) - min(losses) < 2e-2, f"not the same model: losses {losses}"
        times = take_turns(steps, args.turns)
        floors = above_its_floors(steps["plait"], args.turns)
        peaks = {rival: memory(rival, args, name) for rival in RIVALS}
        for rival in RIVALS:
            ratio = times["plait"].times_faster_than(times[rival])
            row = [name, rival, f"{times[rival].median * 1e3:.0f}"]
            row += ["" if rival == "plait" else f"{ratio:.2f}x", f"{peaks[rival]:.0f}"]
            row += ["" if rival == "transformers" else f"{peaks[rival] / peaks['transformers']:.2f}"]
            row += [f"{above:.2f}x" if rival == "plait" else "" for above in floors]
            print(line(*row))


if __name__ == "__main__":
    main()
