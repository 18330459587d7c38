"""Which nodes are fit to train, by rules that look at nothing but their reports; without torch.

A figure is judged against the median of the better half of all devices' figures: sound as long as half of the
devices are, and with two nodes the worse is held against the better.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from ...errors import UserError, few
from ...pretrain.readable import readable_size
from .report import DONE, Report

__all__ = ["Limits", "Verdict", "judge", "write_verdict"]

FIGURES = {"matmul": "TFLOP/s", "memory": "GB/s"}

REMARKED = ("kernel",)
"""Versions in which nodes may differ and train together."""

BUSY = 0.8
"""A rank of a processor that had less of its time explains by that why it is slow."""


@dataclass(frozen=True)
class Limits:
    slow: float = 0.75
    """Of the median of the better half; what is below is slow."""
    max_skew: float = 5.0
    """Seconds."""
    free: int = 10**9
    """Bytes."""


@dataclass
class Verdict:
    bad: dict[str, list[str]]
    """Why, by node."""
    good: list[str]
    remarks: list[str] = field(default_factory=list)
    """What is odd and of no one node, or keeps none from training."""

    @property
    def summary(self) -> str:
        """One line."""
        if not self.bad:
            return f"self-test: {few(self.good, 8)} {'is' if len(self.good) == 1 else 'are'} good"
        bad = "; ".join(f"{node}: {few(reasons, 2, '; ')}" for node, reasons in self.bad.items())
        return f"self-test: {bad}; good: {few(self.good, 8) or 'none'}"


@dataclass(frozen=True)
class _Sum:
    """An all-reduce between two nodes: GB/s, by whoever saw the less of it; 0 where it failed."""

    nodes: tuple[str, str]
    bandwidth: float
    failed: str | None = None


def judge(
    reports: Mapping[str, Report | str], limits: Limits | None = None, session: str | None = None
) -> Verdict:
    """Judge nodes by their reports.

    Args:
        reports: in the order of the nodes; of a node without one, why there is none.
        session: of the meeting that counts; by default that of the node at place 0.
    """
    limits = limits or Limits()
    bad: dict[str, list[str]] = {node: [] for node in reports}
    whole: dict[str, Report] = {}
    if session is None:
        there = [one for one in reports.values() if isinstance(one, Report) and one.place == 0]
        session = there[0].session if there else None
    for node, report in reports.items():
        if isinstance(report, str):
            bad[node].append(report)
        elif report.session not in (None, session):
            bad[node].append("missing: its report is of another self-test")
        else:
            whole[node] = report
            bad[node] += _breaks(report)
    # What a broken node lacks, or its neighbours lack for it, is explained by that.
    sound = {node: report for node, report in whole.items() if not bad[node]}
    _judge_meeting(sound, bad)
    _judge_speeds(whole, limits, bad)
    _judge_disks(whole, limits, bad)
    _judge_clocks(whole, limits, bad)
    remarks = _judge_versions(whole, bad) + _judge_links(sound, limits, bad)
    return Verdict(
        {node: reasons for node, reasons in bad.items() if reasons},
        [node for node, reasons in bad.items() if not reasons],
        remarks,
    )


def write_verdict(folder: Path, verdict: Verdict) -> Path:
    """Write `verdict.json`.

    Raises:
        UserError: the folder cannot be written to.
    """
    file = folder / "verdict.json"
    written = file.with_suffix(".tmp")
    try:
        written.write_text(json.dumps(asdict(verdict), indent=1) + "\n", encoding="utf-8")
        os.replace(written, file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a folder that can be written to") from None
    return file


def _breaks(report: Report) -> list[str]:
    reasons = [f"broken: {report.failed} (in: {report.phase})"] if report.failed else []
    reasons += [f"broken: {one.name}: {one.failed}" for one in report.devices if one.failed]
    if not reasons and report.phase != DONE:
        reasons.append(f"broken: it died or hung (in: {report.phase})")
    return reasons


def _judge_meeting(reports: Mapping[str, Report], bad: dict[str, list[str]]) -> None:
    """Without a host nobody can have met; where none of several came to it, it is to blame."""
    strangers = [node for node, report in reports.items() if report.of > 1 and report.session is None]
    others = [node for node, report in reports.items() if report.place > 0]
    host = next((node for node, report in reports.items() if report.place == 0), None)
    if host is None:
        return
    if host in strangers:
        bad[host].append(f"unreachable: it could not hold the meeting: {reports[host].meeting_failed}")
    elif len(others) > 1 and set(others) == set(strangers):
        bad[host].append(f"unreachable: none of {few(others)} came to the meeting that it holds")
    else:
        for node in strangers:
            bad[node].append(f"unreachable: it did not meet the others: {reports[node].meeting_failed}")


def _judge_speeds(reports: Mapping[str, Report], limits: Limits, bad: dict[str, list[str]]) -> None:
    for figure, unit in FIGURES.items():
        found = [
            (node, device, value)
            for node, report in reports.items()
            for device in report.devices
            if (value := getattr(device, figure)) is not None
        ]
        reference = _reference([value for _, _, value in found])
        for node, device, value in found:
            if value < limits.slow * reference:
                reason = (
                    f"slow: {figure} of {device.name} at {value:.3g} {unit}, "
                    f"{value / reference:.0%} of the {reference:.3g} of the better half"
                )
                if device.share is not None and device.share < BUSY:
                    reason += f" (it had {device.share:.0%} of its processor time)"
                bad[node].append(reason)


def _reference(values: Sequence[float]) -> float:
    """The median of the better half; 0 where there are no values."""
    best = sorted(values, reverse=True)[: (len(values) + 1) // 2]
    return median(best) if best else 0.0


def _judge_disks(reports: Mapping[str, Report], limits: Limits, bad: dict[str, list[str]]) -> None:
    for node, report in reports.items():
        disk = report.disk
        if disk.failed is not None:
            bad[node].append(f"disk: the run's folder cannot be written to: {disk.failed}")
        elif disk.free is not None and disk.free < limits.free:
            free, least = readable_size(disk.free), readable_size(limits.free)
            bad[node].append(f"disk: {free} free in the run's folder, less than {least}")


def _judge_clocks(reports: Mapping[str, Report], limits: Limits, bad: dict[str, list[str]]) -> None:
    """Against the middle one; of two in the middle that which is nearer to place 0's."""
    ahead = {node: report.clock.ahead for node, report in reports.items() if report.clock.ahead is not None}
    if not ahead:
        return
    ordered = sorted(ahead.values())
    middle = min(ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2], key=abs)
    for node, value in ahead.items():
        off = value - middle
        if abs(off) - (reports[node].clock.uncertainty or 0.0) > limits.max_skew:
            where = "ahead of" if off > 0 else "behind"
            bad[node].append(f"clock: {abs(off):.1f} s {where} the others, more than {limits.max_skew:g} s")


def _judge_versions(reports: Mapping[str, Report], bad: dict[str, list[str]]) -> list[str]:
    """Against what most have; of equally many, what the first node among them has."""
    remarks = []
    keys = dict.fromkeys(key for report in reports.values() for key in report.versions)
    for key in [*keys, "device"]:
        found = {node: _version(report, key) for node, report in reports.items()}
        found = {node: value for node, value in found.items() if value is not None}
        if len(set(found.values())) < 2:
            continue
        most = Counter(found.values()).most_common(1)[0][0]
        for node, value in found.items():
            if value == most:
                continue
            reason = f"{key} {value} where most have {most}"
            if key in REMARKED:
                remarks.append(f"{node}: {reason}")
            else:
                bad[node].append(f"versions: {reason}")
    return remarks


def _version(report: Report, key: str) -> str | None:
    """None where it is not known, which another reason tells of."""
    if key != "device":
        return report.versions.get(key, "none") if report.versions else None
    models = list(dict.fromkeys(device.model for device in report.devices if device.model))
    return f"{len(report.devices)} x {' and '.join(models)}" if models else None


def _judge_links(reports: Mapping[str, Report], limits: Limits, bad: dict[str, list[str]]) -> list[str]:
    """A node all of whose links are slow is to blame for them; a slow one between two others is remarked."""
    found: dict[frozenset[str], _Sum] = {}
    for node, report in reports.items():
        for link in (link for link in report.links if link.to in reports):
            key = frozenset((node, link.to))
            bandwidth = 0.0 if link.failed or link.bandwidth is None else link.bandwidth
            before = found.get(key)
            if before is None or bandwidth < before.bandwidth:
                found[key] = _Sum((node, link.to), bandwidth, link.failed)
    reference = _reference([one.bandwidth for one in found.values() if not one.failed])
    slow = {key: one for key, one in found.items() if one.failed or one.bandwidth < limits.slow * reference}
    blamed = set()
    for node in reports:
        mine = [key for key in found if node in key]
        # With one link alone nobody can tell whose fault it is; but who cannot speak at all cannot train.
        dead = mine and all(found[key].failed for key in mine)
        if mine and all(key in slow for key in mine) and (len(mine) > 1 or dead):
            blamed.add(node)
            bad[node].append(f"links: {'; '.join(_tell(found[key], node, reference) for key in mine)}")
    return [f"the link {_tell(one, None, reference)}" for key, one in slow.items() if not key & blamed]


def _tell(one: _Sum, node: str | None, reference: float) -> str:
    first, second = one.nodes
    ends = f"{first} - {second}" if node is None else f"to {second if node == first else first}"
    if one.failed:
        return f"{ends} failed: {one.failed}"
    return f"{ends} at {one.bandwidth:.3g} GB/s, {one.bandwidth / reference:.0%} of {reference:.3g}"
