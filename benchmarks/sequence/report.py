"""The tables of what was measured, and of the closed formulas at sizes that no machine here has."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from table_rows import by_turn, heading, line, median_ratio

from .volumes import FORMS, STATE_FORMS, AttentionShape, MambaShape, layer_sent, pairs

__all__ = ["NEMOTRON", "most_sent", "tables"]

NEMOTRON = MambaShape(d_model=4096, heads=128, head_dim=64, d_state=128, groups=8, element=2)
"""Of Nemotron-H-8B (arXiv 2504.03624), activations in bf16."""

Record = dict[str, Any]


def tables(results: dict[str, Any]) -> str:
    parts = {
        "layer": _layer,
        "attention": _attention,
        "memory": _memory,
        "long": _long,
        "document": _document,
    }
    lines = ["# Sequence parallelism over gloo", ""]
    for name, section in parts.items():
        if name in results:
            lines += [*section(results[name]), "", f"Measured on {results[name]['where']}", ""]
    return "\n".join(lines)


def most_sent(form: str, shape: MambaShape, length: int, ranks: int) -> int:
    """By the rank that sends most, forward and backward."""
    return max(_both(layer_sent(form, shape, length, ranks, place)) for place in range(ranks))


def _both(sent: dict[str, int]) -> int:
    return sent["forward"] + sent["backward"]


def _layer(results: dict[str, Any]) -> Iterator[str]:
    small, demo = MambaShape(**results["small"]), MambaShape(**results["demo"])
    yield "## Bytes of a Mamba-2 layer"
    yield ""
    yield f"{_named(small)}; kB a rank sends, forward and backward: the most, and the mean over ranks"
    yield ""
    yield from heading("ranks", "tokens", *FORMS)
    for ranks, measured in results["ranks"].items():
        for length in _lengths(measured["small"]):
            by_form = [_of(measured["small"], form, length) for form in FORMS]
            sent = [[_both(record) for record in records] for records in by_form]
            yield line(ranks, length, *[f"{max(s) / 1e3:.1f}, {statistics.mean(s) / 1e3:.1f}" for s in sent])
    errors = [error for r in results["ranks"].values() for error in r["largest_error"].values()]
    yield ""
    yield (
        "All are equal to the closed formulas to the byte. In float64 outputs and gradients of all forms "
        f"agree with one rank's within {max(errors):.0e} of the largest number."
    )
    yield ""
    yield "A layer whose forward is computed again in the backward; kB, the most over ranks"
    yield ""
    yield from heading("ranks", "tokens", *FORMS)
    for ranks, measured in results["ranks"].items():
        again = [max(sum(rank[form].values()) for rank in measured["recompute"]) for form in FORMS]
        yield line(ranks, _lengths(measured["small"])[0], *[f"{sent / 1e3:.1f}" for sent in again])
    yield ""
    yield f"By formula, {_named(NEMOTRON)}, bf16; MB, the most over ranks"
    yield ""
    yield from heading("ranks", "tokens", *FORMS)
    for ranks in (8, 64, 512):
        for length in (1 << 12, 1 << 15, 1 << 18, 1 << 20):
            yield line(ranks, length, *[_megabytes(form, length, ranks) for form in FORMS])
    yield ""
    yield "## Time of a Mamba-2 layer"
    yield ""
    yield (
        f"{_named(demo)}; forward and backward: ms of the slowest rank by ring, the other forms as multiples "
        "of it turn by turn; then likewise the seconds worked by all ranks together"
    )
    yield ""
    yield from heading("ranks", "tokens", "ring ms", *FORMS[1:], *[f"{form}, worked" for form in FORMS[1:]])
    for ranks, measured in results["ranks"].items():
        for length in _lengths(measured["demo"]):
            records = {form: _of(measured["demo"], form, length) for form in FORMS}
            seconds = {form: by_turn(records[form], "seconds", max) for form in FORMS}
            worked = {form: by_turn(records[form], "worked", sum) for form in FORMS}
            yield line(
                ranks,
                length,
                f"{statistics.median(seconds['ring']) * 1e3:.0f}",
                *[f"{median_ratio(seconds[form], seconds['ring']):.2f}x" for form in FORMS[1:]],
                *[f"{median_ratio(worked[form], worked['ring']):.2f}x" for form in FORMS[1:]],
            )


def _megabytes(form: str, length: int, ranks: int) -> str:
    if form not in STATE_FORMS and ranks > NEMOTRON.heads:
        return "more ranks than heads"
    return f"{most_sent(form, NEMOTRON, length, ranks) / 1e6:.1f}"


def _attention(results: dict[str, Any]) -> Iterator[str]:
    shape = AttentionShape(**results["shape"])
    yield "## Attention with and without the fold of queries"
    yield ""
    yield (
        f"{shape.heads} query heads and {shape.key_heads} key heads of {shape.head_dim}, fp32, causal, one "
        "document; forward and backward. MB that rank 0 sends; of the busiest rank over the mean, pairs of a "
        "query and a key that it sees, and processor seconds; the busiest rank's processor seconds; the "
        "slowest rank's time, and how many times faster the fold makes it"
    )
    yield ""
    yield from heading(
        "ranks",
        "tokens",
        "K and V",
        "fold",
        *("pairs", "folded", "worked", "folded", "busiest s", "folded", "slowest s", "folded", "faster"),
    )
    for ranks, measured in results["ranks"].items():
        count = int(ranks)
        for length in _lengths(measured):
            plain, folded = _of(measured, "plain", length), _of(measured, "folded", length)
            seconds = [by_turn(records, "seconds", max) for records in (plain, folded)]
            yield line(
                ranks,
                length,
                f"{plain[0]['gather'] / 1e6:.1f}",
                f"{folded[0]['fold'] / 1e6:.1f}",
                *[f"{_unevenness(_pairs(length, count, fold)):.3f}" for fold in (False, True)],
                *[f"{_unevenness(_worked(records)):.2f}" for records in (plain, folded)],
                *[f"{max(_worked(records)):.2f}" for records in (plain, folded)],
                *[f"{statistics.median(turns):.2f}" for turns in seconds],
                f"{median_ratio(seconds[0], seconds[1]):.2f}x",
            )


def _pairs(length: int, ranks: int, fold: bool) -> list[int]:
    return [pairs(length, ranks, place, fold=fold) for place in range(ranks)]


def _worked(records: list[Record]) -> list[float]:
    return [statistics.median(record["worked"]) for record in records]


def _unevenness(values: Sequence[float]) -> float:
    return max(values) / statistics.mean(values)


def _memory(results: dict[str, Any]) -> Iterator[str]:
    shape = AttentionShape(**results["attention"])
    yield "## Memory at fixed tokens per rank"
    yield ""
    yield (
        f"The demo's model in fp32, {results['tokens']} tokens a rank, one sequence, the second step; MB of "
        "the rank that has most. Parameters and optimizer stand between steps; the peak is what the resident "
        "set rises by during one"
    )
    yield ""
    yield from heading(
        "sp", "tokens", "parameters, optimizer", "peak", "gathered K and V", "the rest", "of sp 1's"
    )
    alone = None
    for ranks, by_rank in results["ranks"].items():
        count = int(ranks)
        tokens = results["tokens"] * count
        gathered = 2 * shape.batch * tokens * shape.key_heads * shape.head_dim * shape.element
        standing = max(rank["parameters"] + rank["optimizer"] for rank in by_rank)
        peak = max(rank["peak"] for rank in by_rank)
        rest = peak - gathered
        alone = alone or rest
        numbers = [f"{number / 1e6:.1f}" for number in (standing, peak, gathered, rest)]
        yield line(ranks, tokens, *numbers, f"{rest / alone:.3f}")


def _long(results: dict[str, Any]) -> Iterator[str]:
    yield "## A window of 64 K tokens on 4 ranks, packed documents"
    yield from _steps(results)


def _document(results: dict[str, Any]) -> Iterator[str]:
    yield "## 64 K tokens as one document on 4 ranks"
    yield from _steps(results)


def _steps(results: dict[str, Any]) -> Iterator[str]:
    by_rank = results["by_rank"]
    peaks = ", ".join(f"{rank['peak'] / 1e6:.0f}" for rank in by_rank)
    yield ""
    yield (
        f"The demo's model in fp32, sp {results['ranks']}, one sequence of {results['length']} tokens a "
        f"step. Peak of the last step above what stands, by rank: {peaks} MB"
    )
    yield ""
    yield from heading("step", "loss", "s", "tokens/s")
    for index, step in enumerate(by_rank[0]["steps"]):
        seconds = max(rank["steps"][index]["seconds"] for rank in by_rank)
        yield line(index + 1, f"{step['loss']:.4f}", f"{seconds:.1f}", f"{results['length'] / seconds:.0f}")


def _named(shape: MambaShape) -> str:
    return (
        f"D {shape.d_model}, H {shape.heads}, P {shape.head_dim}, N {shape.d_state}, G {shape.groups}, "
        f"B {shape.batch}"
    )


def _lengths(by_rank: list[list[Record]]) -> list[int]:
    return sorted({record["length"] for record in by_rank[0]})


def _of(by_rank: list[list[Record]], form: str, length: int) -> list[Record]:
    """Of each rank."""
    return [r for rank in by_rank for r in rank if r["form"] == form and r["length"] == length]
