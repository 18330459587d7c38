"""The mixture-of-experts layer, measured: against transformers and a dense MLP, uneven experts, bytes.

    python benchmarks/moe.py [--parts layer imbalance bytes] [--out benchmarks/results]

Every process has one thread; ranks are processes of this machine over gloo. transformers' layer has the
same weights, and outputs and gradients are checked before anything is timed. Every byte comes from the
mesh's ledger and is held against a closed formula while it is counted. Results are kept by part in
OUT/moe-MACHINE.json; the tables beside it are made of all that it holds, which is all that `--parts` without
a name does.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from experts import forms, imbalance, sent
from experts.ranks import on_ranks
from experts.report import tables
from experts.shapes import Shape
from timing import machine

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 4096
"""Of a rank, where time is measured."""
DTYPES = ("float32", "bfloat16")
SHAPES = (
    Shape(256, 8, 2, 512),
    Shape(256, 32, 4, 256),
    Shape(256, 32, 4, 256, d_shared=512),
    Shape(512, 64, 8, 256),
    Shape(512, 64, 8, 256, latent_dim=128),
)
TURNS = 5
UNEVEN = (Shape(256, 32, 1, 256), Shape(256, 32, 4, 256))
HOT = (0.25, 0.5, 0.75, 1.0)
UNEVEN_TURNS = 10
SMALL = (Shape(64, 16, 2, 32), Shape(64, 16, 2, 32, d_shared=64, latent_dim=32))
SMALL_TOKENS = 256


def layer() -> dict[str, Any]:
    shapes = [asdict(shape) for shape in SHAPES]
    [records] = on_ranks(1, forms.job, shapes=shapes, tokens=TOKENS, dtypes=DTYPES, turns=TURNS)
    for dtype in DTYPES:
        for form in forms.FORMS:
            [peaks] = on_ranks(
                1, forms.memory_job, freed_at_once=True, name=form, shapes=shapes, tokens=TOKENS, dtype=dtype
            )
            for shape, peak in zip(shapes, peaks, strict=True):
                for record in records:
                    if (record["dtype"], record["form"], record["shape"]) == (dtype, form, shape):
                        record["peak"] = peak
    return {"records": records, "tokens": TOKENS}


def uneven() -> dict[str, Any]:
    shapes = [asdict(shape) for shape in UNEVEN]
    results = {}
    for ranks in (1, 2, 4):
        # Over ranks one dtype shows it: what is uneven is the rows.
        dtypes = DTYPES if ranks == 1 else DTYPES[:1]
        options = {"tokens": TOKENS, "dtypes": dtypes, "hot": HOT, "turns": UNEVEN_TURNS}
        results[str(ranks)] = on_ranks(ranks, imbalance.job, shapes=shapes, **options)
    return {"ranks": results, "tokens": TOKENS}


def volume() -> dict[str, Any]:
    shapes = [asdict(shape) for shape in SMALL]
    options = {"shapes": shapes, "tokens": SMALL_TOKENS, "dtypes": DTYPES}
    by_rank = {str(ranks): on_ranks(ranks, sent.job, **options) for ranks in (2, 4, 8)}
    return {"ranks": by_rank, "tokens": SMALL_TOKENS}


PARTS = {"layer": layer, "imbalance": uneven, "bytes": volume}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = machine().split(",")[0].lower().replace(" ", "-")
    kept = args.out / f"moe-{name}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in args.parts:
        print(f"{part} …", file=sys.stderr, flush=True)
        before = os.getloadavg()[0]
        results[part] = PARTS[part]()
        load = f"a load of {before:.1f} before it began and {os.getloadavg()[0]:.1f} after"
        results[part]["where"] = (
            f"{os.cpu_count()} cores, a process has one: {machine('transformers')}; {load}"
        )
        kept.write_text(json.dumps(results) + "\n")
    text = tables(results)
    kept.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
