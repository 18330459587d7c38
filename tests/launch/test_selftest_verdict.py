"""Who is found unfit, by reports that say what a rule is about."""

import json
from dataclasses import asdict

import pytest

from plait.errors import UserError
from plait.launch.selftest.report import (
    DONE,
    Clock,
    Device,
    Disk,
    Link,
    Report,
    read_reports,
    report_file,
    write_report,
)
from plait.launch.selftest.verdict import Limits, Verdict, judge, write_verdict


def cluster(nodes: int, devices: int = 1) -> dict[str, Report]:
    """Nodes n0, n1, … of which none has a fault; their figures differ a little, as they do."""
    names = [f"n{place}" for place in range(nodes)]
    return {
        name: Report(
            name,
            place,
            nodes,
            f"host-{place}",
            DONE,
            session="one" if nodes > 1 else None,
            names=list(names) if nodes > 1 else [],
            devices=[
                Device(f"cuda:{i}", "H100", "done", 700.0 - 20 * (place % 3) - i, 2800.0 + 50 * (place % 2))
                for i in range(devices)
            ],
            disk=Disk(10**12, 0.002),
            clock=Clock(0.001 * place, 0.0002),
            links=[
                Link(names[other % nodes], 20.0 + place % 2)
                for other in sorted({(place - 1) % nodes, (place + 1) % nodes} - {place})
            ],
            versions={"plait": "0.1.0+a", "torch": "2.13.0", "kernel": "6.1"},
        )
        for place, name in enumerate(names)
    }


def reasons(nodes: dict, limits: Limits | None = None) -> dict[str, str]:
    return {node: "; ".join(why) for node, why in judge(nodes, limits).bad.items()}


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 16, 257])
@pytest.mark.parametrize("devices", [1, 8])
def test_nobody_is_blamed_without_a_fault(nodes, devices):
    verdict = judge(cluster(nodes, devices))
    assert (verdict.bad, verdict.remarks) == ({}, [])
    assert verdict.good == [f"n{place}" for place in range(nodes)]


@pytest.mark.parametrize("figure", ["matmul", "memory"])
@pytest.mark.parametrize("nodes", [2, 3, 4, 9])
@pytest.mark.parametrize("which", ["first", "last"])
def test_one_at_half_speed_is_found(figure, nodes, which):
    whole = cluster(nodes, devices=2)
    node = "n0" if which == "first" else f"n{nodes - 1}"
    device = whole[node].devices[1]
    setattr(device, figure, getattr(device, figure) / 2)
    found = reasons(whole)
    assert list(found) == [node]
    assert found[node].startswith(f"slow: {figure} of cuda:1 at ")
    assert ";" not in found[node]


def test_a_slow_device_is_found_among_those_of_one_node():
    whole = cluster(1, devices=8)
    whole["n0"].devices[3].matmul = 340.0
    assert reasons(whole) == {
        "n0": "slow: matmul of cuda:3 at 340 TFLOP/s, 49% of the 698 of the better half"
    }


def test_all_slow_ones_are_found_up_to_half_of_all():
    whole = cluster(8)
    for node in ("n1", "n4", "n5", "n7"):
        whole[node].devices[0].matmul = 350.0
    assert list(reasons(whole)) == ["n1", "n4", "n5", "n7"]


@pytest.mark.parametrize(("limit", "blamed"), [(0.75, []), (0.9, ["n1"]), (0.0, [])])
def test_how_slow_is_slow_is_a_choice(limit, blamed):
    whole = cluster(2)
    whole["n1"].devices[0].matmul = 0.8 * 700
    assert list(reasons(whole, Limits(slow=limit))) == blamed


def test_a_processor_that_others_use_says_so():
    whole = cluster(2)
    whole["n0"].devices[0].share, whole["n1"].devices[0].share = 0.97, 0.48
    whole["n1"].devices[0].matmul = 340.0
    assert reasons(whole)["n1"].endswith(" (it had 48% of its processor time)")
    whole["n0"].devices[0].matmul, whole["n1"].devices[0].matmul = 340.0, 700.0
    assert reasons(whole)["n0"].endswith("of the better half")


def edit(**changes):
    def apply(report: Report) -> None:
        for key, value in changes.items():
            setattr(report, key, value)

    return apply


def fail_device(report: Report) -> None:
    report.devices[0] = Device("cuda:0", failed="killed by signal 9 (in: matmul)", phase="matmul")
    report.session, report.names, report.links = None, [], []
    report.clock = Clock()


UNFIT = {
    "a device that died": (fail_device, "broken: cuda:0: killed by signal 9 (in: matmul)"),
    "no devices": (
        edit(failed="0 GPUs for 8 ranks", phase="devices", devices=[]),
        "broken: 0 GPUs for 8 ranks (in: devices)",
    ),
    "a node that died": (
        edit(phase="matmul and memory", session=None, links=[]),
        "broken: it died or hung (in: matmul and memory)",
    ),
    "a full disk": (
        edit(disk=Disk(5 * 10**8, 0.1)),
        "disk: 500 MB free in the run's folder, less than 1.00 GB",
    ),
    "a disk that refuses": (
        edit(disk=Disk(10**12, failed="Read-only file system")),
        "disk: the run's folder cannot be written to: Read-only file system",
    ),
    "a disk that is not there": (
        edit(disk=Disk(failed="No such file or directory")),
        "disk: the run's folder cannot be written to: No such file or directory",
    ),
    "a clock ahead": (
        edit(clock=Clock(7.0, 0.001)),
        "clock: 7.0 s ahead of the others, more than 5 s",
    ),
    "a clock behind": (
        edit(clock=Clock(-6.2, 0.001)),
        "clock: 6.2 s behind the others, more than 5 s",
    ),
    "another torch": (
        edit(versions={"plait": "0.1.0+a", "torch": "2.12.0", "kernel": "6.1"}),
        "versions: torch 2.12.0 where most have 2.13.0",
    ),
    "a library too few": (
        edit(versions={"plait": "0.1.0+a", "kernel": "6.1"}),
        "versions: torch none where most have 2.13.0",
    ),
    "another device": (
        edit(devices=[Device("cuda:0", "H200", "done", 690.0, 2800.0)]),
        "versions: device 1 x H200 where most have 1 x H100",
    ),
    "another number of devices": (
        edit(devices=[Device(f"cuda:{i}", "H100", "done", 690.0, 2800.0) for i in range(2)]),
        "versions: device 2 x H100 where most have 1 x H100",
    ),
    "a node that came too late": (
        edit(session=None, names=[], links=[], meeting_failed="it came when the others had begun"),
        "unreachable: it did not meet the others: it came when the others had begun",
    ),
    "an old report": (edit(session="another"), "missing: its report is of another self-test"),
}


@pytest.mark.parametrize("nodes", [2, 3, 6])
@pytest.mark.parametrize("fault", UNFIT)
def test_the_node_with_the_fault_is_named_and_no_other(nodes, fault):
    change, reason = UNFIT[fault]
    whole = cluster(nodes)
    change(whole["n1"])
    verdict = judge(whole)
    assert verdict.bad == {"n1": [reason]}
    assert verdict.good == [node for node in whole if node != "n1"]


@pytest.mark.parametrize("nodes", [2, 5])
def test_a_node_without_a_report_is_missing(nodes, tmp_path):
    whole = cluster(nodes)
    for node in list(whole)[:-1]:
        report = whole[node]
        report.links = [link for link in report.links if link.to != f"n{nodes - 1}"]
        write_report(tmp_path, report)
    reports = read_reports(tmp_path, whole)
    assert reports["n0"] == whole["n0"]
    assert reasons(reports) == {f"n{nodes - 1}": "missing: it left no report"}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"node": "n1"}', "null", '{"devices": [[]], "odd": 1}'])
def test_a_report_that_is_none_is_a_broken_node(text, tmp_path):
    for report in cluster(3).values():
        write_report(tmp_path, report)
    report_file(tmp_path, "n1").write_text(text)
    assert reasons(read_reports(tmp_path, ["n0", "n1", "n2"])) == {"n1": "broken: its report is none"}


@pytest.mark.parametrize("node", ["", "../n1", ".n1"])
def test_a_name_that_leads_elsewhere_is_refused(node, tmp_path):
    with pytest.raises(UserError, match="is no name of a node"):
        report_file(tmp_path, node)


def test_limits_are_choices():
    whole = cluster(2)
    whole["n1"].disk.free = 5 * 10**8
    whole["n1"].clock.ahead = 7.0
    assert reasons(whole, Limits(max_skew=10.0, free=10**8)) == {}


def test_a_clock_whose_reading_is_uncertain_is_not_blamed_for_that():
    whole = cluster(3)
    whole["n1"].clock = Clock(7.0, 3.0)
    assert reasons(whole) == {}


def test_when_place_0_has_the_wrong_time_it_is_the_one():
    whole = cluster(4)
    for node in ("n1", "n2", "n3"):
        whole[node].clock = Clock(-60.0, 0.001)
    assert reasons(whole) == {"n0": "clock: 60.0 s ahead of the others, more than 5 s"}


def test_versions_go_by_most_and_then_by_the_first():
    whole = cluster(3)
    for node in ("n1", "n2"):
        whole[node].versions["torch"] = "2.14.0"
    assert reasons(whole) == {"n0": "versions: torch 2.13.0 where most have 2.14.0"}
    del whole["n2"]
    assert list(reasons(whole)) == ["n1"]


def test_another_kernel_is_remarked():
    whole = cluster(3)
    whole["n2"].versions["kernel"] = "6.2"
    verdict = judge(whole)
    assert (verdict.bad, verdict.remarks) == ({}, ["n2: kernel 6.2 where most have 6.1"])


def slow_links(whole: dict[str, Report], *pairs: tuple[str, str], failed: str | None = None) -> None:
    for pair in pairs:
        for node, other in (pair, pair[::-1]):
            (link,) = (link for link in whole[node].links if link.to == other)
            link.bandwidth, link.failed = (None, failed) if failed else (4.0, None)


LINKS = {
    "both of a node": (5, [("n0", "n1"), ("n1", "n2")], ["n1"], []),
    "both of a node of three": (3, [("n0", "n1"), ("n1", "n2")], ["n1"], []),
    "all of two nodes that are neighbours": (5, [("n0", "n1"), ("n1", "n2"), ("n2", "n3")], ["n1", "n2"], []),
    "over the ring's end": (4, [("n2", "n3"), ("n3", "n0")], ["n3"], []),
    "one": (4, [("n1", "n2")], [], ["n1 - n2"]),
    "one of three": (3, [("n1", "n2")], [], ["n1 - n2"]),
}


@pytest.mark.parametrize("failed", [None, "Connection refused"])
@pytest.mark.parametrize("case", LINKS)
def test_links_blame_the_node_all_of_whose_are_slow(case, failed):
    nodes, pairs, blamed, remarked = LINKS[case]
    whole = cluster(nodes)
    slow_links(whole, *pairs, failed=failed)
    verdict = judge(whole)
    assert list(verdict.bad) == blamed
    assert all(why[0].startswith("links: to n") for why in verdict.bad.values())
    told = "failed: Connection refused" if failed else "at 4 GB/s, 20% of 20"
    assert verdict.remarks == [f"the link {pair} {told}" for pair in remarked]


def test_of_two_nodes_a_slow_link_has_no_measure_and_a_dead_one_leaves_neither():
    whole = cluster(2)
    slow_links(whole, ("n0", "n1"))
    assert reasons(whole) == {}
    slow_links(whole, ("n0", "n1"), failed="timed out")
    assert reasons(whole) == {
        "n0": "links: to n1 failed: timed out",
        "n1": "links: to n0 failed: timed out",
    }


def test_a_link_is_as_fast_as_who_saw_it_slower():
    whole = cluster(4)
    whole["n1"].links[1].bandwidth = 4.0
    assert judge(whole).remarks == ["the link n1 - n2 at 4 GB/s, 20% of 20"]


def test_neighbours_are_not_blamed_for_one_that_broke_at_its_links():
    whole = cluster(2)
    slow_links(whole, ("n0", "n1"), failed="closed by peer")
    whole["n1"].devices[0].failed = "no answer after 60 s (in: links)"
    assert list(reasons(whole)) == ["n1"]


def strangers(whole: dict[str, Report], *nodes: str) -> None:
    for node in nodes:
        edit(session=None, names=[], links=[], clock=Clock(), meeting_failed="timed out")(whole[node])


def test_where_none_of_several_came_the_host_is_to_blame():
    whole = cluster(4)
    for report in whole.values():
        report.links = []
    strangers(whole, "n1", "n2", "n3")
    assert reasons(whole) == {
        "n0": "unreachable: none of n1, n2, n3 came to the meeting that it holds",
    }
    whole = cluster(2)
    whole["n0"].links = []
    strangers(whole, "n1")
    assert list(reasons(whole)) == ["n1"]


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_host_that_holds_no_meeting_is_to_blame_alone(nodes):
    whole = cluster(nodes)
    strangers(whole, *whole)
    whole["n0"].meeting_failed = "the port is taken"
    assert reasons(whole) == {"n0": "unreachable: it could not hold the meeting: the port is taken"}
    reports = {**whole, "n0": "missing: it left no report"}
    assert list(reasons(reports)) == ["n0"]


def test_all_that_is_wrong_with_a_node_is_told():
    whole = cluster(3)
    edit(disk=Disk(1, 0.1), clock=Clock(9.0, 0.1))(whole["n2"])
    whole["n2"].devices[0].matmul = 1.0
    assert [why.partition(":")[0] for why in judge(whole).bad["n2"]] == ["slow", "disk", "clock"]


def test_a_verdict_is_a_file_and_a_line(tmp_path):
    verdict = Verdict({"n1": ["slow: a", "disk: b", "clock: c"]}, ["n0", "n2"])
    assert json.loads(write_verdict(tmp_path, verdict).read_text()) == asdict(verdict)
    assert verdict.summary == "self-test: n1: slow: a; disk: b and 1 more; good: n0, n2"
    assert judge(cluster(1)).summary == "self-test: n0 is good"
    assert judge(cluster(10)).summary == "self-test: n0, n1, n2, n3, n4, n5, n6, n7 and 2 more are good"
    with pytest.raises(UserError, match="name a folder that can be written to"):
        write_verdict(tmp_path / "nowhere", verdict)
