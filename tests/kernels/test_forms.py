"""The choice of an operator's form, and of a kernel's block sizes."""

import json

import pytest
import torch

from plait.errors import UserError
from plait.kernels import forms, tables


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.delenv("PLAIT_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(forms, "triton_version", lambda: "3.9.0")
    return monkeypatch


def form(device, dtype):
    return forms.form_and_reason(torch.device(device), dtype)[0]


def test_a_gpu_takes_triton_and_a_cpu_does_not(clean):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert form("cuda", dtype) == "triton"
        assert form("cpu", dtype) == "torch"
    assert form("cuda", torch.float64) == "torch"
    assert form("mps", torch.float32) == "torch"
    assert forms.form_of(torch.zeros(2)) == "torch"
    clean.setenv("PLAIT_KERNELS", "torch")
    assert form("cuda", torch.float32) == "torch"


def test_a_cpu_interprets_only_where_both_are_asked_for(clean):
    clean.setenv("TRITON_INTERPRET", "1")
    assert form("cpu", torch.float32) == "torch"
    clean.setenv("PLAIT_KERNELS", "triton")
    assert form("cpu", torch.float32) == "triton"
    assert form("cpu", torch.float64) == "torch"
    clean.setenv("TRITON_INTERPRET", "0")
    assert form("cpu", torch.float32) == "torch"


def test_without_triton_auto_falls_back_and_triton_is_refused(clean):
    clean.setattr(forms, "triton_version", lambda: None)
    assert form("cuda", torch.float32) == "torch"
    clean.setenv("PLAIT_KERNELS", "triton")
    with pytest.raises(UserError, match="install it, or set auto or torch"):
        form("cuda", torch.float32)
    clean.setenv("PLAIT_KERNELS", "fast")
    with pytest.raises(UserError, match="PLAIT_KERNELS=fast: expected auto, torch or triton"):
        form("cpu", torch.float64)


def test_every_architecture_has_a_table_and_others_take_the_nearest():
    for arch in tables.ARCHITECTURES:
        assert set(tables._table(arch)) <= {"like", "kernels"}
        for entries in tables._table(arch)["kernels"].values():
            assert "upto" not in entries[-1]
    near = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120", "sm_75": "sm_86", "gfx950": "gfx942"}
    assert {arch: tables.nearest(arch) for arch in near} == near
    with pytest.raises(KeyError, match="in no table"):
        tables.choice("not_a_kernel", "sm_90")
    assert tables.arch_of(torch.device("cpu")) == "sm_80"


def test_a_table_of_ones_own_wins_and_its_first_fitting_entry_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "plait" / "kernels"
    folder.mkdir(parents=True)
    entries = [{"upto": {"N": 64, "P": 32}, "block": 16}, {"upto": {"N": 64}, "block": 32}, {"block": 64}]
    (folder / "sm_99.json").write_text(json.dumps({"kernels": {"mine": entries}}))
    (folder / "sm_98.json").write_text("{}")
    assert tables.choice("mine", "sm_99", N=64, P=32) == {"block": 16}
    assert tables.choice("mine", "sm_99", N=64, P=33) == {"block": 32}
    assert tables.choice("mine", "sm_99", N=65, P=1) == {"block": 64}
    with pytest.raises(UserError, match=r"sm_98\.json is no table of kernels"):
        tables.choice("mine", "sm_98")
