"""What `plait launch doctor` and the judge print: a row a node, then why."""

from collections.abc import Mapping

from rich.console import Console

from ...pretrain.readable import readable_size
from ..whole_tables import plain_table, print_whole
from .report import Report
from .verdict import Verdict

__all__ = ["print_reports"]


def print_reports(reports: Mapping[str, Report | str], verdict: Verdict) -> None:
    """Print what was found and what follows from it."""
    console = Console(highlight=False)
    table = plain_table(
        "node",
        "devices",
        "matmul TFLOP/s",
        "memory GB/s",
        "all-reduce GB/s",
        "disk free",
        "write",
        "clock",
        "",
    )
    for column in table.columns[2:8]:
        column.justify = "right"
    for node, report in reports.items():
        cells = [""] * 7 if isinstance(report, str) else _cells(report)
        table.add_row(node, *cells, "[red]bad[/]" if node in verdict.bad else "[green]good[/]")
    print_whole(console, table)
    for node, reasons in verdict.bad.items():
        for reason in reasons:
            console.print(f"{node}: {reason}", markup=False, soft_wrap=True)
    for remark in verdict.remarks:
        console.print(f"remark: {remark}", markup=False, soft_wrap=True)


def _cells(report: Report) -> list[str]:
    devices = report.devices
    models = list(dict.fromkeys(device.model for device in devices if device.model))
    write, clock = report.disk.write_seconds, report.clock
    return [
        f"{len(devices)} x {' and '.join(models) or 'unknown'}" if devices else "",
        _least([device.matmul for device in devices]),
        _least([device.memory for device in devices]),
        ", ".join(
            f"{link.to} {'failed' if link.bandwidth is None else format(link.bandwidth, '.3g')}"
            for link in report.links
        ),
        "" if report.disk.free is None else readable_size(report.disk.free),
        "failed" if report.disk.failed else "" if write is None else f"{write * 1e3:.1f} ms",
        "" if clock.ahead is None else f"{clock.ahead * 1e3:+.1f} ± {(clock.uncertainty or 0) * 1e3:.1f} ms",
    ]


def _least(values: list[float | None]) -> str:
    """That of the slowest device, which all others wait for."""
    known = [value for value in values if value is not None]
    return f"{min(known):.3g}" if known else ""
