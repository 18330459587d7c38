"""`plait checkpoint`: what it prints, what it deletes, and its one line for every mistake."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.pretrain.callbacks import Checkpointing, MetricsFile
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.trainer import Trainer

Plait = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def plait(plait, monkeypatch: pytest.MonkeyPatch) -> Plait:
    """Run `plait checkpoint`; returns the exit status, the lines it printed, and what stood on standard
    error."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TZ", "UTC")

    def run(*words: object) -> tuple[int, list[str], str]:
        code, out, err = plait("checkpoint", *words)
        return code, [line.rstrip() for line in out.splitlines()], err

    return run


@pytest.fixture
def run(tiny: dict) -> Path:
    """A run with checkpoints of the steps 2, 4, 6, 8."""
    tiny["checkpoint"] |= {"every": 2, "keep": 9}
    tiny["train"]["steps"] = 8
    Trainer(parse_config(tiny, "test"), [MetricsFile(), Checkpointing()]).run()
    return Path(tiny["run"]["dir"])


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").glob("step-*"))


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{path}: damaged: its checksum is not the one of manifest.json; use another checkpoint"


def cut(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, 100)
    return f"{path}: has 100 of {size} bytes; use another checkpoint"


def test_list(run: Path, plait: Plait) -> None:
    cut(folder(run, 6) / "rank-00000.bin")
    (run / "checkpoints" / ".tmp-step-00000010").mkdir()
    code, lines, _ = plait("list", run)
    assert code == 0
    assert lines[0].split() == ["step", "saved", "size", "layout", "tokens", "loss", "state"]
    losses = [f"{record['loss']:.4f}" for record in read_metrics(run / "metrics.jsonl")]
    when = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    for line, step, state in zip(
        lines[1:5], (2, 4, 6, 8), ("whole", "whole", "", "whole, newest"), strict=True
    ):
        if state:
            tokens, loss = step * 4 * 50, losses[step - 1]
            expected = rf" *{step}  {when}  \d+ kB  one rank  +{tokens:,}  {loss}  {state}"
        else:
            expected = r" *6 +not whole: rank-00000\.bin: has 100 of \d+ bytes"
        assert re.fullmatch(expected, line), line
    assert lines[5:] == [
        ".tmp-step-00000010: being written, or left over by a run that died; the next save clears it away"
    ]


def test_list_needs_no_torch(run: Path) -> None:
    for words in (["list", str(run)], ["list", "--help"]):
        code = (
            f"import sys; sys.argv = ['plait', 'checkpoint', *{words!r}]\n"
            "from plait.launch.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert not end.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_show(run: Path, plait: Plait) -> None:
    code, lines, _ = plait("show", f"{run}@4")
    text = "\n".join(lines)
    assert code == 0
    assert lines[0] == f"step 4 of {run}"
    (checkpoint,) = (c for c in Checkpoints(run / "checkpoints").all() if c.step == 4)
    facts = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines[1:]}
    assert facts["saved"].endswith(", save number 2 of the run")
    assert (facts["layout"], facts["pattern"]) == ("one rank", "M*-E")
    assert (facts["samples"], facts["tokens"]) == ("16", "800")
    assert facts["plan"] == "1 stage"
    assert facts["plan fingerprint"] == checkpoint.manifest.facts["plan_fingerprint"]
    assert f"torch {torch.__version__}" in facts["versions"]
    for record in checkpoint.manifest.files.values():
        assert re.search(rf"^{record.name} +[0-9.]+ kB  {record.sha256[:16]}…$", text, re.MULTILINE)
    groups = {cells[0]: int(cells[1]) for line in lines if len(cells := line.split()) == 5}
    assert sum(groups.values()) == len(checkpoint.names())
    assert list(groups) == [
        *("model", "router", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq", "rng")
    ]
    assert plait("show", run)[1][0] == f"step 8 of {run}"


def test_verify(run: Path, plait: Plait) -> None:
    code, lines, _ = plait("verify", run)
    assert code == 0
    (line,) = lines
    assert re.fullmatch(rf"{folder(run, 8)}: intact, 3 files, \d+ kB", line)
    assert [line.partition(":")[0] for line in plait("verify", run, "--all")[1]] == [
        str(folder(run, step)) for step in (2, 4, 6, 8)
    ]

    damages = [flip(folder(run, 4) / name) for name in ("rank-00000.bin", "metadata.json")]
    assert plait("verify", f"{run}@4")[:2] == (1, damages)
    assert plait("verify", run)[0] == 0
    code, lines, _ = plait("verify", run, "--all")
    assert (code, lines[1:3], len(lines)) == (1, damages, 5)

    # What a resume passes over is no longer the newest, and is told of all the same.
    damage = cut(folder(run, 8) / "rank-00000.bin")
    code, lines, _ = plait("verify", run)
    assert (code, lines[1]) == (1, damage)
    assert lines[0].startswith(f"{folder(run, 6)}: intact")
    (folder(run, 8) / "manifest.json").write_text("{}")
    assert plait("verify", f"{run}@8")[:2] == (
        1,
        [f"{folder(run, 8)}/manifest.json: damaged: its checksum does not fit; use another checkpoint"],
    )


def test_prune(run: Path, plait: Plait) -> None:
    code, lines, _ = plait("prune", run, "--keep", 1, "--keep-every", 4, "--dry-run")
    assert code == 0
    assert [re.sub(r", \d+ kB$", "", line) for line in lines] == [
        f"would delete {folder(run, 2)}",
        f"would delete {folder(run, 6)}",
        "would stay: 4, 8; the last of them was read and is intact",
    ]
    assert steps(run) == [2, 4, 6, 8]
    code, lines, _ = plait("prune", run, "--keep", 1, "--keep-every", 4)
    assert code == 0
    assert lines[-1] == "stay: 4, 8; the last of them was read and is intact"
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000004", "step-00000008"]


def test_prune_spares_the_newest_that_is_intact(run: Path, plait: Plait) -> None:
    cut_off = cut(folder(run, 8) / "rank-00000.bin")
    flipped = flip(folder(run, 6) / "rank-00000.bin")
    code, lines, _ = plait("prune", run, "--keep", 1)
    assert code == 0
    assert lines[:2] == [f"left alone: {cut_off}", f"left alone: {flipped}"]
    assert steps(run) == [4, 6, 8]
    flip(folder(run, 4) / "metadata.json")
    code, _, error = plait("prune", run, "--keep", 1)
    assert (code, error) == (
        2,
        f"plait: error: {run}: none of its checkpoints is intact; nothing was deleted\n",
    )
    assert steps(run) == [4, 6, 8]


def test_prune_keeps_away_from_a_run_that_trains(run: Path, plait: Plait) -> None:
    with RunFolder(run).lock():
        code, _, error = plait("prune", run, "--keep", 1)
        assert code == 2
        assert "another process is training here" in error
        assert (run / ".lock").read_text().split()[0] == str(os.getpid())
        assert plait("prune", run, "--keep", 1, "--dry-run")[0] == 0
    assert steps(run) == [2, 4, 6, 8]


def test_diff_of_two_steps(run: Path, plait: Plait) -> None:
    code, lines, _ = plait("diff", f"{run}@4", run)
    assert code == 0
    assert lines[:2] == [f"A  step 4 of {run}", f"B  step 8 of {run}"]
    assert "the same config" in lines
    rows = {cells[0]: cells[1:] for line in lines if (cells := line.split())}
    first, second = (
        next(c for c in Checkpoints(run / "checkpoints").all() if c.step == step) for step in (4, 8)
    )
    tensors = {}
    for checkpoint in (first, second):
        loaded = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in checkpoint.tensors.items()}
        checkpoint.load_into(loaded)
        tensors[checkpoint.step] = loaded
    a, b = (
        torch.cat([t.flatten().double() for n, t in tensors[step].items() if n.startswith("model.")])
        for step in (4, 8)
    )
    names = [name for name in first.names() if name.startswith("model.")]
    assert rows["model"][0] == str(len(names))
    assert rows["model"][2] == f"{float((b - a).norm() / a.norm()):.2e}"
    relative = {n: float((tensors[8][n] - tensors[4][n]).norm() / tensors[4][n].norm()) for n in names}
    assert rows["model"][3] == max(relative, key=lambda name: relative[name])
    # 4 steps counted, and 8.
    assert rows["optimizer.step"][1:3] == ["0", "1.00e+00"]

    _, lines, _ = plait("diff", run, run)
    for line in lines[lines.index("the same config") + 3 :]:
        _, count, identical, distance = line.split()
        assert (count, distance) == (identical, "0")


def test_diff_of_two_runs(tmp_path: Path, plait: Plait) -> None:
    configs = {
        "one": "train: {steps: 5}\nmodel: {pattern: M}\n",
        "two": "train: {steps: 6}\nmodel: {pattern: M}\n",
    }
    nan = torch.tensor([1.0, float("nan")])
    tensors = {
        "one": {
            "model.a": torch.ones(3),
            "model.b": torch.ones(2),
            "model.x": nan,
            "model.old": torch.ones(1),
        },
        "two": {
            "model.a": torch.ones(3).double(),
            "model.b": torch.ones(2, 1),
            "model.x": nan,
            "model.new": nan,
        },
    }
    tensors["one"]["rng.zero"], tensors["two"]["rng.zero"] = torch.zeros(2), torch.ones(2)
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
        Checkpoints(tmp_path / name / "checkpoints").save(1, tensors[name], {"config": text})
    code, lines, _ = plait("diff", tmp_path / "one", tmp_path / "two")
    assert code == 0
    cells = [line.split() for line in lines]
    assert ["train.steps", "5", "6"] in cells
    assert not any("model.pattern" in line for line in lines)
    assert "only in A: model.old" in lines
    assert "only in B: model.new" in lines
    assert (
        "other shape or dtype: model.a, (3,) float32 in A and (3,) float64 in B; "
        "model.b, (2,) float32 in A and (2, 1) float32 in B"
    ) in lines
    assert ["model", "2", "1", "nan", "model.a", "0.00e+00"] in cells
    assert ["rng", "1", "0", "inf", "rng.zero", "inf"] in cells


def test_mistakes(run: Path, plait: Plait, tmp_path: Path) -> None:
    def line(*words: object) -> str:
        code, lines, error = plait(*words)
        assert (code, lines) == (2, [])
        said = re.fullmatch(r"plait: error: (.*)\n", error)
        assert said, error
        return said[1].replace(str(tmp_path), "T")

    nowhere = "T/nowhere: no run is here (it has no config.yaml); name a run's folder"
    for command in (["list"], ["show"], ["verify"], ["prune", "--keep", 1], ["diff", run]):
        assert line(*command, tmp_path / "nowhere") == nowhere
    no_five = "T/run: holds no checkpoint of step 5; choose one of 2, 4, 6, 8"
    for command in (["show"], ["verify"], ["diff", run]):
        assert line(*command, f"{run}@5") == no_five
    assert line("list", f"{run}@4") == (
        "T/run@4: names a checkpoint, and this is about a run; leave out @4, or use plait checkpoint show"
    )
    assert line("prune", f"{run}@4", "--keep", 1).startswith("T/run@4: names a checkpoint")
    assert line("verify", f"{run}@4", "--all") == (
        "T/run@4 --all: names one checkpoint and all of them; leave out one of the two"
    )
    assert plait("prune", run, "--keep", 0)[0] == 2
    assert plait("prune", run)[0] == 2
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    assert line("prune", run, "--keep", 1) == "T/run: cannot be locked: Is a directory; mend the permissions"
    assert steps(run) == [2, 4, 6, 8]
    shutil.rmtree(run / "checkpoints")
    for command in (["list"], ["verify"], ["prune", "--dry-run", "--keep", 1]):
        assert line(*command, run) == "T/run: holds no checkpoint yet; train on"
    assert line("show", run) == "T/run: holds no whole checkpoint yet; train on"
    (run / "checkpoints").write_text("")
    assert line("list", run) == "T/run/checkpoints: Not a directory; mend the folder"
