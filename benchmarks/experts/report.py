"""The tables of what was measured, and of the closed formulas at sizes that no machine here has."""

import statistics
from collections.abc import Iterator
from typing import Any

from table_rows import by_turn, heading, line, median_ratio

from .forms import FORMS
from .sent import KINDS, WAYS
from .shapes import Shape
from .volumes import even_sent, tensor_cut_sent

__all__ = ["tables"]

REAL = {
    "Nemotron 3 Nano": Shape(2688, 128, 6, 1856),
    "Nemotron 3 Super": Shape(4096, 512, 22, 2688, latent_dim=1024),
    "32 experts, 2 a token": Shape(4096, 32, 2, 14336),
}
"""Published configurations of NVIDIA's Nemotron 3, and few coarse experts, as many as Hunyuan-TurboS has
(arXiv 2505.15431), at a width of our own. F takes no part."""
REAL_TOKENS = 4096
REAL_ELEMENT = 2

Record = dict[str, Any]
Sent = dict[str, list[int]]
"""Kind -> bytes of each direction."""


def tables(results: dict[str, Any]) -> str:
    parts = {"layer": _layer, "imbalance": _imbalance, "bytes": _bytes}
    lines = ["# The mixture-of-experts layer", ""]
    for name, section in parts.items():
        if name in results:
            lines += [*section(results[name]), "", f"Measured on {results[name]['where']}", ""]
    return "\n".join(lines)


def _layer(results: dict[str, Any]) -> Iterator[str]:
    yield "## Against transformers and a dense MLP"
    yield ""
    yield (
        f"One rank, {results['tokens']} tokens, forward and backward, squared ReLU; D model width, E "
        "experts, K a token, F their hidden width, W the latent width. The dense MLP is as wide (d_ff) as "
        "takes the products of a token's experts. Times are medians of the turns; plait is faster by the "
        "median over turns of the other's time by its own, and works less likewise in the processor's "
        "seconds. The peak is what the resident set rises by above weights and inputs. The difference from "
        "plait is the largest in the output and every gradient, relative to the largest number in each"
    )
    yield ""
    yield from heading(
        *("dtype", "layer", "", "ms", "plait is faster by", "processor ms", "works less by"),
        *("peak MB", "difference"),
    )
    plait = None
    for record in results["records"]:
        if record["form"] == FORMS[0]:
            plait = record
        assert plait is not None
        shape = Shape(**record["shape"])
        yield line(
            record["dtype"],
            f"d_ff {shape.dense}" if record["form"] == FORMS[-1] else shape,
            record["form"],
            *_against(record, plait, "seconds"),
            *_against(record, plait, "worked"),
            f"{record['peak'] / 1e6:.0f}",
            f"{record['difference']:.0e}" if "difference" in record else "",
        )


def _against(record: Record, plait: Record, what: str) -> tuple[str, str]:
    ratio = "" if record is plait else f"{median_ratio(record[what], plait[what]):.2f}x"
    return f"{statistics.median(record[what]) * 1e3:.0f}", ratio


def _imbalance(results: dict[str, Any]) -> Iterator[str]:
    yield "## As one expert gets hotter"
    yield ""
    yield (
        f"{results['tokens']} tokens a rank, forward and backward. The share is that of the tokens that have "
        "expert 0, from even on; the other experts are even, and no token has an expert twice. Over ranks "
        "of ep: the rows of the fullest rank's experts by the mean; the slowest rank's time, and the "
        "processor seconds of the busiest, each also as a multiple of even turn by turn"
    )
    yield ""
    yield from heading("dtype", "layer", "ranks", "share", "rows", "ms", "of even", "processor ms", "of even")
    for ranks, by_rank in results["ranks"].items():
        even: dict[str, list[float]] = {}
        layer = None
        for records in zip(*by_rank, strict=True):
            first = records[0]
            turns = {what: by_turn(records, what, max) for what in ("seconds", "worked")}
            if layer != (first["dtype"], first["shape"]):
                layer, even = (first["dtype"], first["shape"]), turns
            rows = [record["rows"] for record in records]
            cells = []
            for what, times in turns.items():
                cells += [f"{statistics.median(times) * 1e3:.0f}", f"{median_ratio(times, even[what]):.2f}x"]
            fullest = f"{max(rows) / statistics.mean(rows):.2f}"
            share = f"{first['share']:.3g}"
            yield line(first["dtype"], Shape(**first["shape"]), ranks, share, fullest, *cells)


def _bytes(results: dict[str, Any]) -> Iterator[str]:
    yield "## Bytes"
    yield ""
    yield (
        f"{results['tokens']} tokens a rank; bytes that the ledger counts for a forward and a backward, the "
        "most over ranks, by the router's own choice and with one expert that every token has. With r_ij "
        "rows that rank i has for the experts of rank j, e bytes an activation and R ranks, rank i sends (R "
        "− 1) E / R · 8 of numbers, once; W e Σ_j≠i r_ij with the dispatch and W e Σ_j≠i r_ji with the "
        "combine; in the backward the one's bytes for the other's. Equal to the byte on every rank. A layer "
        "that is computed again for its backward sends the forward's rows once more, and none where "
        "`keep_dispatched` is set"
    )
    yield ""
    yield from heading("dtype", "layer", "ranks", "choice", *KINDS, *WAYS)
    for ranks, by_rank in results["ranks"].items():
        layers: dict[tuple[Any, ...], dict[str, list[Sent]]] = {}
        for records in zip(*by_rank, strict=True):
            first = records[0]
            layer = (first["dtype"], Shape(**first["shape"]), ranks, first["choice"])
            layers.setdefault(layer, {})[first["way"]] = [record["sent"] for record in records]
        for layer, by_way in layers.items():
            kinds = [max(sum(sent[kind]) for sent in by_way["once"]) for kind in KINDS]
            whole = [max(sum(map(sum, sent.values())) for sent in by_way[way]) for way in WAYS]
            yield line(*layer, *kinds, *whole)
    yield ""
    yield from _real()


def _real() -> Iterator[str]:
    tensor = (2, 4, 8)
    yield (
        f"By formula, for even routing, {REAL_TOKENS} tokens a rank, bf16: MB that a rank sends in one "
        "layer's forward and backward. plait: 4 S W e (R − 1) / R, S = T K rows of a rank, and the numbers. "
        "Beside it experts that are divided over R / tp ranks and each cut over tp: so does Megatron-LM's "
        "alltoall dispatcher where `expert-tensor-parallel-size` is left at its default, the other layers' "
        "tp, by an all-to-all and a gather over tp, and back: 4 S W e ((1 − tp / R) + (tp − 1)), which is "
        "tp times plait's. The numbers and the router's weights that it sends too are left out; with "
        "`expert-tensor-parallel-size` 1 its rows are plait's. (README.md and token_dispatcher.py of "
        "megatron/core/transformer/moe, megatron-core 0.16.)"
    )
    yield ""
    yield from heading("", "W", "E", "K", "ranks", "plait", "its numbers", *[f"cut over {n}" for n in tensor])
    for name, shape in REAL.items():
        for ranks in (8, 32):
            rows, row = REAL_TOKENS * shape.top_k, shape.width * REAL_ELEMENT
            sent = even_sent(rows, ranks, shape.num_experts, row)
            cut = [tensor_cut_sent(rows, ranks, tp, row) for tp in tensor]
            yield line(
                *(name, shape.width, shape.num_experts, shape.top_k, ranks),
                f"{sent.total / 1e6:.0f}",
                f"{sent.expert_counts / 1e6:.4f}",
                *[f"{number / 1e6:.0f}" for number in cut],
            )
