"""`make gpu`: its harness with sections made up for it, and (long) all of it through the interpreter."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.harness import SECTIONS, Section, run_all  # noqa: E402
from gpu.packages import fits, unpack  # noqa: E402
from gpu.plot import lines  # noqa: E402
from gpu.report import write_report  # noqa: E402

HERE = Path(__file__).parent


def section_of(kind: str, out: Path, seconds: float) -> dict:
    section = Section(kind, "sections_under_test", seconds)
    environment = {"KIND_OF_SECTION": kind, "PYTHONPATH": str(HERE)}
    return run_all((section,), out, ["--tiny"], environment=environment)[kind]


def test_what_a_section_found_stays_however_it_ends(tmp_path):
    # The budget of one that does not hang is never used up; that of one that does need only be short.
    ends = {
        "good": ("done", 60),
        "raises": ("failed", 60),
        "dies": ("failed", 60),
        "hangs": ("out of time", 3),
    }
    everything = {}
    for kind, (state, seconds) in ends.items():
        found = everything[kind] = section_of(kind, tmp_path, seconds)
        assert found["state"] == state, found
        if kind != "hangs":
            assert found["results"] == {"tiny": True, "rows": [{"kind": kind}]}
        assert json.loads((tmp_path / "results.json").read_text()) == {kind: found}
    assert everything["good"]["error"] == ""
    assert "ValueError: a kernel that fails" in everything["raises"]["error"]
    assert "last words" in everything["dies"]["error"]
    write_report(everything, "a device", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| hangs | out of time |" in page
    assert "ValueError: a kernel that fails" in page


def test_the_budgets_end_within_eight_minutes():
    assert sum(section.seconds for section in SECTIONS) < 8 * 60


def test_the_page_says_what_is_wrong_and_what_was_measured(tmp_path):
    compared = [
        {"operator": "ssd", "dtype": "bfloat16", "errors": {"output 0": 1e-3}, "limit": 3e-2, "right": True},
        {
            "operator": "swiglu",
            "dtype": "bfloat16",
            "errors": {"grad up": 0.5},
            "limit": 3e-2,
            "right": False,
        },
    ]
    time = {"ms": 2.0, "least": 2.0, "most": 2.0, "calls": 3}
    scans = [
        {"form": "plait, Q 128", "B": 2, "L": 2048, "forward": time, "both": time, "difference": 0.0},
        {"form": "mamba_ssm", "B": 2, "L": 2048, "error": "RuntimeError: not installed"},
        {
            "form": "minimal",
            "B": 2,
            "L": 2048,
            "forward": time,
            "both": {**time, "ms": 5.0},
            "difference": 0.01,
        },
    ]
    everything = {
        "correctness": {"state": "failed", "seconds": 1, "error": "x", "results": {"operators": compared}},
        "scan": {
            "state": "done",
            "seconds": 1,
            "error": "",
            "results": {"heads": {"H": 4}, "scans": scans},
        },
    }
    write_report(everything, "a device", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "1 of 2 comparisons" in page
    assert "- wrong: swiglu, bfloat16: grad up 5.0e-01" in page
    assert "| 2048 | 2 | minimal | 2.000 | 5.000 | 2.50x | 1.0e-02 |" in page
    assert "RuntimeError: not installed" in page
    assert "polyline" in (tmp_path / "scan-both.svg").read_text()
    assert lines("nothing", "x", "y", {}).startswith("<svg")


def test_a_kit_s_wheels_are_unpacked_if_they_fit(tmp_path):
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    names = {
        "pure-1.0-py3-none-any.whl": True,
        f"native-1.0-{own}-{own}-manylinux2014_riscv.whl": False,
        f"other-1.0-cp39-cp39-manylinux2014_{__import__('platform').machine()}.whl": False,
    }
    for name, fitting in names.items():
        assert fits(name) == fitting
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    folder = unpack(tmp_path)
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["pure"]
    assert unpack(tmp_path / "none") is None


@pytest.mark.long
def test_a_rehearsal_goes_through_every_section(tmp_path):
    command = [
        sys.executable,
        "-m",
        "gpu",
        "--interpret",
        "--tiny",
        "--patience",
        "10",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "report.md").read_text()
    everything = json.loads((tmp_path / "results.json").read_text())
    assert {name: found["state"] for name, found in everything.items()} == {
        section.name: "done" for section in SECTIONS
    }
    assert (tmp_path / "step-trace.json.gz").exists()
