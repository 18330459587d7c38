"""The one page that results are read from, and its drawings; written anew after every section."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .plot import lines

__all__ = ["write_report"]

Everything = dict[str, dict[str, Any]]


def write_report(everything: Everything, name: str, out: Path) -> None:
    """report.md, and scan-forward.svg and scan-both.svg where there is something to draw."""
    out.mkdir(parents=True, exist_ok=True)
    page = "\n".join([f"# plait on {name}", "", *_page(everything)])
    (out / "report.md").write_text(page.rstrip() + "\n")
    scans = _of(everything, "scan").get("scans", [])
    for way, title in (("forward", "forward"), ("both", "forward and backward")):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in scans:
            if way in row:
                tokens = row["B"] * row["L"]
                series.setdefault(row["form"], []).append((row["L"], row[way]["ms"] * 1e6 / tokens))
        if series:
            drawing = lines(f"SSD, {title}, on {name}", "tokens a sequence", "nanoseconds a token", series)
            (out / f"scan-{way}.svg").write_text(drawing)


def _page(everything: Everything) -> Iterator[str]:
    machine = _of(everything, "machine")
    if machine:
        versions = ", ".join(
            f"{key} {machine[key]}" for key in ("python", "torch", "triton") if key in machine
        )
        yield f"`make gpu`; {versions}; {machine.get('date', '')}"
        yield ""
    yield from _table(
        ("section", "state", "seconds"),
        [(section, found["state"], found["seconds"]) for section, found in everything.items()],
    )
    for title, write in (
        ("Right and repeatable", _checks),
        ("What the device gives", _roofline),
        ("A training step", _step),
        ("The scan", _scan),
        ("Each launch", _launches),
    ):
        if body := list(write(everything)):
            yield from ("", f"## {title}", "", *body)
    for section, found in everything.items():
        if found["error"]:
            yield from ("", f"## {section}: {found['state']}", "", "```", found["error"].rstrip(), "```")
    if "doctor" in machine:
        yield from ("", "## Which form each operator takes", "", "```", *machine["doctor"], "```")


def _checks(everything: Everything) -> Iterator[str]:
    compared = _of(everything, "correctness").get("operators", [])
    if compared:
        wrong = [row for row in compared if not row["right"]]
        yield (
            f"{len(compared) - len(wrong)} of {len(compared)} comparisons with float64 specifications are "
            "within their limits: outputs, states and every gradient, by the largest number in each."
        )
        rows = []
        for dtype in dict.fromkeys(row["dtype"] for row in compared):
            errors = [
                max(row["errors"].values()) for row in compared if row["dtype"] == dtype and "errors" in row
            ]
            if errors:
                limit = next(row["limit"] for row in compared if row["dtype"] == dtype and "limit" in row)
                rows.append((dtype, f"{max(errors):.1e}", f"{limit:.0e}"))
        yield from ("", *_table(("dtype", "largest difference", "limit"), rows), "")
        for row in wrong:
            what = row.get("error") or ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
            yield f"- wrong: {row['operator']}, {row['dtype']}: {what.strip().splitlines()[-1]}"
    repeated = _of(everything, "determinism").get("operators", [])
    if repeated:
        differing = [row for row in repeated if row["differing"]]
        same = len(repeated) - len(differing)
        yield f"{same} of {len(repeated)} operators give the same bits in {repeated[0]['runs']} runs."
        for row in differing:
            yield f"- differing: {row['operator']}: {', '.join(row['differing'])}"


def _roofline(everything: Everything) -> Iterator[str]:
    found = _of(everything, "roofline")
    if "teraflops" in found:
        yield (
            f"{found['terabytes_a_second']:.2f} TB/s copied, {found['teraflops']:.0f} TFLOP/s of bf16 "
            "products, each the best of three sizes."
        )


def _step(everything: Everything) -> Iterator[str]:
    found = _of(everything, "step")
    rows = [
        (
            row["kernels"],
            f"{row['batch']}{', recomputing' if row['recomputing'] else ''}",
            *(
                (row["error"], "", "", "", "")
                if "error" in row
                else (
                    f"{row['ms']:.1f}",
                    f"{row['tokens_per_second']:.0f}",
                    f"{row['mfu']:.1%}",
                    f"{row['model_teraflops']:.1f}",
                    f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
                )
            ),
        )
        for row in found.get("steps", [])
    ]
    if not rows:
        return
    shape = found["shape"]
    yield f"{shape['pattern']}, D {shape['d_model']}, {shape['length']} tokens a sequence, with documents."
    yield ""
    heading = ("kernels", "sequences", "step ms", "tokens/s", "MFU", "model TFLOP/s", "peak GiB")
    yield from _table(heading, rows)
    best = next((row for row in found["steps"] if "kernels_by_time" in row), None)
    if best:
        yield from ("", "Where its time goes; the whole trace is step-trace.json.gz:", "")
        parts = [
            (row["name"], f"{row['ms']:.2f}", f"{row['part']:.1%}") for row in best["kernels_by_time"][:12]
        ]
        yield from _table(("kernel", "ms", "part"), parts)


def _scan(everything: Everything) -> Iterator[str]:
    found = _of(everything, "scan")
    scans = found.get("scans", [])
    if not scans:
        return
    yield ", ".join(f"{name} {size}" for name, size in found["heads"].items()) + "; milliseconds, medians."
    yield ""
    ours = {}
    for row in scans:
        if row["form"].startswith("plait, ") and "both" in row:
            ours[row["L"]] = min(row["both"]["ms"], ours.get(row["L"], float("inf")))
    rows = []
    for row in scans:
        cells = [row["L"], row["B"], row["form"]]
        if "error" in row:
            rows.append((*cells, row["error"], "", "", ""))
            continue
        ratio = row["both"]["ms"] / ours[row["L"]] if row["L"] in ours else float("nan")
        times = (f"{row['forward']['ms']:.3f}", f"{row['both']['ms']:.3f}")
        rows.append((*cells, *times, f"{ratio:.2f}x", f"{row['difference']:.1e}"))
    heading = ("L", "B", "form", "forward", "both", "of plait's best", "difference")
    yield from _table(heading, rows)


def _launches(everything: Everything) -> Iterator[str]:
    peak = _of(everything, "roofline").get("terabytes_a_second")
    rows = []
    for row in _of(everything, "kernels").get("launches", []):
        speed = row.get("terabytes_a_second")
        of_peak = f"{speed / peak:.0%}" if speed and peak else ""
        shown = f"{speed:.2f}" if speed else ""
        rows.append(
            (
                row["operator"],
                row["call"],
                row["shape"],
                f"{row['ms']:.3f}",
                shown,
                of_peak,
                row["first_seconds"],
            )
        )
    if rows:
        yield "Bytes are each tensor's once. The first call's seconds have its compilation in them."
        yield ""
        yield from _table(("operator", "call", "shape", "ms", "TB/s", "of copies", "first s"), rows)


def _of(everything: Everything, section: str) -> dict[str, Any]:
    return everything.get(section, {}).get("results", {})


def _table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    for row in rows:
        # A bar in a cell would end it.
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
