"""Sequence parallelism, measured: bytes that ranks send, time, evenness of attention, memory.

    python benchmarks/sequence_parallel.py [--parts layer attention memory long] [--out benchmarks/results]

Ranks are processes of this machine over gloo, one thread each. Every byte comes from the mesh's ledger and is
held against a closed formula while it is measured; the rival, the all-to-all over heads of Megatron-LM, is
checked against one rank in float64. Results are kept by part in OUT/sequence-parallel-gloo.json; the tables
and the plot beside it are made of all that it holds, which is all that `--parts` without a name does. Part
`document` (two steps on one document of 64 K tokens, some minutes) runs only where it is named.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sequence.plot import draw
from sequence.ranks import on_ranks
from sequence.report import tables
from sequence.volumes import AttentionShape, MambaShape
from timing import machine

ROOT = Path(__file__).resolve().parent.parent
RANKS = (2, 4, 8)
LENGTHS = [1 << k for k in (12, 14, 16, 18)]
DEMO = MambaShape(d_model=256, heads=8, head_dim=64, d_state=64, groups=1)
SMALL = MambaShape(d_model=64, heads=8, head_dim=16, d_state=16, groups=1)
"""The demo's layer but for a quarter of each width: 256 K tokens go through it on two cores."""
TURNS = {4096: 5, 16384: 3, 32768: 2}
ATTENTION = AttentionShape(heads=4, key_heads=2, head_dim=64)
ATTENTION_TURNS = {2: {8192: 5, 16384: 2, 32768: 1}, 4: {8192: 3}, 8: {8192: 3}}
SHARD = 4096
"""Tokens of a rank, where memory is measured."""


def layer() -> dict[str, Any]:
    results = {}
    for ranks in RANKS:
        small, grouped = asdict(SMALL), asdict(SMALL) | {"groups": 4, "batch": 2}
        exact, exact_grouped, sent, again, timed = on_ranks(
            ranks,
            [
                ("exact", {"shape": small, "length": 512}),
                ("exact", {"shape": grouped, "length": 512}),
                ("layer", {"shape": small, "lengths": LENGTHS, "turns": {}}),
                ("recompute", {"shape": small, "length": LENGTHS[0]}),
                ("layer", {"shape": asdict(DEMO), "lengths": list(TURNS), "turns": TURNS}),
            ],
        )
        results[str(ranks)] = {
            "largest_error": {form: max(exact[0][form], exact_grouped[0][form]) for form in exact[0]},
            "small": sent,
            "recompute": again,
            "demo": timed,
        }
    return {"ranks": results, "small": asdict(SMALL), "demo": asdict(DEMO)}


def attention() -> dict[str, Any]:
    results = {}
    for ranks, turns in ATTENTION_TURNS.items():
        results[str(ranks)], *_ = on_ranks(ranks, [("fold", {"shape": asdict(ATTENTION), "turns": turns})])
    return {"ranks": results, "shape": asdict(ATTENTION)}


def memory() -> dict[str, Any]:
    results = {}
    with TemporaryDirectory(prefix="plait-benchmark-") as scratch:
        for ranks in (1, *RANKS):
            results[str(ranks)] = _train(Path(scratch), ranks, SHARD * ranks, steps=2)
    return {"ranks": results, "tokens": SHARD, "attention": asdict(ATTENTION)}


def long() -> dict[str, Any]:
    with TemporaryDirectory(prefix="plait-benchmark-") as scratch:
        return {"ranks": 4, "length": 65536, "by_rank": _train(Path(scratch), 4, 65536, steps=3)}


def document() -> dict[str, Any]:
    with TemporaryDirectory(prefix="plait-benchmark-") as scratch:
        whole = "data.isolate_documents=false"
        by_rank = _train(Path(scratch), 4, 65536, steps=2, overrides=[whole])
        return {"ranks": 4, "length": 65536, "by_rank": by_rank}


def _train(scratch: Path, ranks: int, length: int, steps: int, overrides: list[str] | None = None) -> Any:
    """Each rank's measurements of the demo's model on one sequence a step."""
    corpus = _corpus(scratch)
    settings = [
        f"run.dir={scratch / f'run-{ranks}-{length}'}",
        f"data.blend={{{corpus / 'train'}: 1.0}}",
        f"data.validation={corpus / 'validation'}",
        f"data.seq_len={length}",
        "train.batch_size=1",
        f"parallel.sp={ranks}",
        *(overrides or []),
    ]
    config = str(ROOT / "configs" / "demo.yaml")
    job = ("training", {"config": config, "overrides": settings, "steps": steps})
    [by_rank] = on_ranks(ranks, [job], freed_at_once=True)
    return by_rank


def _corpus(scratch: Path) -> Path:
    """The demo's; where it was not built yet, one made in the scratch folder."""
    built = ROOT / "corpora" / "stdlib"
    if built.exists():
        return built
    corpus, model = scratch / "stdlib", scratch / "stdlib.model"
    if not corpus.exists():
        plait = [sys.executable, "-m", "plait.launch", "data"]
        sized = [str(model), "--corpus", "stdlib", "--vocab-size", "4096"]
        subprocess.run([*plait, "tokenizer", *sized], check=True, stdout=sys.stderr)
        sourced = [str(corpus), "--corpus", "stdlib", "--tokenizer", str(model)]
        subprocess.run([*plait, "build", *sourced], check=True, stdout=sys.stderr)
    return corpus


PARTS = {f.__name__: f for f in (layer, attention, memory, long, document)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["layer", "attention", "memory", "long"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "sequence-parallel-gloo.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in args.parts:
        print(f"{part} …", file=sys.stderr, flush=True)
        load = os.getloadavg()[0]
        where = f"{os.cpu_count()} cores, a rank has one: {machine()}; a load of {load:.0f} before it began"
        results[part] = PARTS[part]() | {"where": where}
        kept.write_text(json.dumps(results) + "\n")
    text = tables(results)
    (args.out / "sequence-parallel-gloo.md").write_text(text)
    print(text)
    if "layer" in results:
        draw(results["layer"], args.out / "sequence-parallel-bytes.png")


if __name__ == "__main__":
    main()
