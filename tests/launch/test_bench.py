"""`plait bench`: what kernels run here and why, their model, tuning and warming."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from plait.errors import UserError
from plait.kernels import compile_cache, tables
from plait.kernels.compiling import SHAPES
from plait.kernels.devices import GPUS
from plait.kernels.ssd.traffic import floor, mamba_ssm
from plait.launch.cli import app


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")

    def run(*words):
        return CliRunner().invoke(app, ["bench", *map(str, words)])

    return run


def test_the_doctor_says_why(bench, monkeypatch, tmp_path):
    text = bench("doctor").output
    assert "PLAIT_KERNELS  auto, since it is not set" in text
    assert f"{tmp_path / 'cache'}; writable" in text
    assert "torch: on a CPU" in text
    monkeypatch.setenv("PLAIT_KERNELS", "torch")
    assert "torch: PLAIT_KERNELS=torch" in bench("doctor").output


def test_the_model_agrees_with_what_was_published_of_it():
    """At B 8, L 4096, H 128, P 64, N 128, G 8, Q 256: floors of 0.41 and 0.63 ms, mamba_ssm 1.38 and 5.0."""
    gpu, shape = GPUS["h100"], SHAPES[0]
    forward, backward = (one.seconds(gpu) * 1e3 for one in floor(shape))
    assert forward == pytest.approx(0.41, rel=0.02)
    assert backward == pytest.approx(0.63, rel=0.03)
    theirs = [one for one in mamba_ssm(shape) if one.forward]
    assert len(theirs) == 5
    assert sum(one.seconds(gpu) for one in theirs) * 1e3 == pytest.approx(1.38, rel=0.02)
    # Counted anew from the tensors that pass between its kernels, the backward comes to a little less.
    back = [one for one in mamba_ssm(shape) if not one.forward]
    assert sum(one.seconds(gpu) for one in back) * 1e3 == pytest.approx(5.0, rel=0.1)


def test_the_model_has_a_row_a_launch(bench):
    words = ("--batch", 1, "--length", 512, "--heads", 4, "--groups", 2, "--chunk-size", 64)
    text = bench("ssd", "--model", "--gpu", "a100", *words).output
    for name in ("floor, forward", "plait: ssd.states", "plait: ssd.output", "mamba_ssm: chunk_scan_fwd"):
        assert f"| {name} |" in text
    for name in ("plait: ssd.grad_states", "plait: ssd.grad_c", "plait: ssd.grad_x", "plait: ssd.grad_steps"):
        assert f"| {name} |" in text
    with pytest.raises(UserError, match="--gpu v100: expected one of a100"):
        raise bench("ssd", "--model", "--gpu", "v100").exception
    with pytest.raises(UserError, match="--heads 5 is no multiple of --groups 2"):
        raise bench("ssd", "--model", "--heads", 5, "--groups", 2).exception


def test_a_cache_is_ours_and_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "given"))
    assert compile_cache.keep_in(None) == tmp_path / "given"
    assert compile_cache.keep_in(str(tmp_path / "named")) == tmp_path / "named"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "named")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(compile_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert compile_cache.keep_in(None).name.startswith("plait-kernels-")
    file = tmp_path / "file"
    file.write_text("")
    assert not compile_cache.look_at(file / "cache").writable
    assert not compile_cache.Cache(tmp_path, True, "nfs4").on_this_machine
    assert compile_cache.Cache(tmp_path, True, "ext4").on_this_machine
    monkeypatch.setattr(compile_cache.os, "getuid", lambda: 12345)
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 23456, 23456) if os.geteuid() == 0 else pytest.skip("needs root")
    with pytest.raises(UserError, match="belongs to user 23456"):
        compile_cache.keep_in(str(tmp_path / "theirs"))


def test_warming_compiles_what_a_config_needs(bench, tiny, tmp_path):
    tiny["model"] |= {"pattern": "-*"}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.dump(tiny))
    cache = tmp_path / "kernels"
    text = bench("warm", config, "--arch", "sm_90", "--processes", 2, f"train.kernel_cache={cache}").output
    assert f"kernels for sm_90 in {cache}" in text
    assert len(list(cache.rglob("*.cubin"))) >= 6
    with pytest.raises(UserError, match="--arch sm_70: expected one of"):
        raise bench("warm", config, "--arch", "sm_70").exception


def test_tuning_rehearsed_in_the_interpreter_writes_a_table(tmp_path, monkeypatch):
    out = tmp_path / ".config" / "plait" / "kernels" / "sm_80.json"
    words = ("--interpret", "--tiny", "--most", "1", "--dtype", "float32", "--operator", "activation")
    command = [sys.executable, "-m", "plait.launch", "bench", "tune", *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "activation: " in done.stdout
    (entry,) = json.loads(out.read_text())["kernels"]["activation"]
    assert set(entry) == {"block", "num_warps", "num_stages"}
    monkeypatch.setenv("HOME", str(tmp_path))
    tables._own_table.cache_clear()
    tables._choice.cache_clear()
    assert tables.choice("activation", "sm_80") == entry
    tables._own_table.cache_clear()
    tables._choice.cache_clear()
