"""Compiling ahead of time: what is read from binaries, and that a launch finds what was compiled for it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.kernels import ahead
from plait.kernels.ahead import compile_all
from plait.kernels.compiling import LIMITS, SHAPES, TARGETS, Shape, compile_for, occupancy
from plait.kernels.forms import interpreted
from plait.kernels.launches import OPERATORS, launches
from plait.kernels.launching import launch
from plait.kernels.recording import recording

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.skipif(interpreted(), reason="nothing is compiled where Triton interprets")

AOT = Path(__file__).parents[2] / "benchmarks" / "aot.py"
TINY = Shape("tiny", 2, 96, 4, 16, 2, 16, 64, 96, 32, Q=32, E=16, K=2)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def test_atomics_and_32_bit_offsets_are_seen():
    from kernels_under_test import adds_up, doubles

    x, total = torch.empty(1 << 20, device="meta", dtype=torch.bfloat16), torch.empty(1, device="meta")
    for arch, atomic in (("sm_90", "atom."), ("gfx942", "global_atomic")):
        with recording(arch) as written:
            launch(adds_up, (1024,), x, total, x.numel(), num_warps=8, BLOCK=1024)
            launch(doubles, (1024,), x, x.clone(), x.numel(), num_warps=4, BLOCK=1024)
        bad, good = (compile_for(one, arch) for one in written)
        assert bad.atomics[0].startswith(atomic)
        assert (bad.narrow, bad.reads, bad.writes) == (("x",), ("total", "x"), ("total",))
        assert (good.atomics, good.narrow, good.reads, good.writes) == ((), (), ("x",), ("y",))
        assert 0 < good.registers < 256
        assert good.fits
        assert written[0].num_warps == 8
        assert written[1].num_stages == 1
        assert written[0].aligned == {"x", "total", "count"}
        assert (written[1].bytes_read(good), written[1].bytes_written(good)) == (2 << 20, 2 << 20)


def test_occupancy_is_what_the_scarcest_thing_allows():
    h100, l40, mi300 = LIMITS["sm_90"], LIMITS["sm_89"], LIMITS["gfx942"]
    assert occupancy(h100, registers=32, shared=0, num_warps=4) == 1.0
    assert occupancy(h100, registers=128, shared=0, num_warps=4) == 0.25
    assert occupancy(h100, registers=32, shared=100 << 10, num_warps=4) == 8 / 64
    assert occupancy(h100, registers=32, shared=228 << 10, num_warps=4) == 0
    assert occupancy(l40, registers=32, shared=100 << 10, num_warps=4) == 0
    assert occupancy(LIMITS["sm_100"], registers=32, shared=0, num_warps=4, columns=256) == 8 / 64
    assert occupancy(mi300, registers=128, shared=0, num_warps=4) == 0.5


def test_recording_leaves_triton_as_it_was():
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, knobs.runtime.jit_cache_hook, driver._active
    with pytest.raises(ZeroDivisionError), recording("sm_90"):
        _ = 1 // 0
    assert (JITFunction.run, knobs.runtime.jit_cache_hook, driver._active) == before


def test_what_is_asked_for_twice_is_compiled_once(tmp_path, monkeypatch):
    """The second time triton finds the binary in its cache, as a launch would."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (first,) = {launch.binary: launch for launch in launches(TINY, "sm_90", ("cross_entropy",))[:1]}.values()
    compile_for(first, "sm_90")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(made) == 1
    compile_for(launches(TINY, "sm_90", ("cross_entropy",))[0], "sm_90")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == made


def test_every_kernel_compiles_for_a_gpu_of_each_vendor():
    shapes = [SHAPES[0], next(shape for shape in SHAPES if shape.E)]
    todo = []
    for arch, names in (("sm_90", ("ssd", "experts")), ("gfx942", ("convolution", "cross_entropy"))):
        found = {}
        for shape in shapes if "experts" in names else shapes[:1]:
            for one in launches(shape, arch, names, documents=True):
                found.setdefault(one.name, one)
        todo += [(one, arch) for one in found.values()]
    for compiled in compile_all(todo, 2):
        one, arch = todo[compiled.place]
        assert compiled.usage is not None, f"{arch} {one.name}: {compiled.error}"
        assert compiled.usage.fits, f"{arch} {one.name}"
        assert compiled.usage.atomics == (), f"{arch} {one.name}"


def test_its_processes_end_by_sigterm_where_ours_only_hears_it(monkeypatch):
    """As in a run that trains, whose handlers they have when they begin."""
    monkeypatch.setattr(ahead, "compile_for", lambda *_: signal.getsignal(signal.SIGTERM))
    # One of the two begins so late that the other has done its work.
    begin = ahead._begin
    monkeypatch.setattr(ahead, "_begin", lambda niceness: (time.sleep(os.getpid() % 2), begin(niceness)))
    launch = launches(TINY, "sm_90", ("activation",))[0]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        found = list(compile_all([(launch, "sm_90")] * 2, 2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [one.usage for one in found] == [signal.SIG_DFL] * 2


def test_a_compiler_s_complaint_is_one_line():
    launch = launches(TINY, "sm_90", ("activation",))[0]
    broken = replace(launch, constants={**launch.constants, "BLOCK": 1000})
    (compiled,) = compile_all([(broken, "sm_90")], 1)
    assert compiled.usage is None
    assert "\n" not in compiled.error
    assert "power of 2" in compiled.error


def test_production_shapes_are_divided_over_tp():
    whole, one_of_eight = SHAPES[0], SHAPES[1]
    assert (whole.H, whole.G, whole.V, whole.tp) == (128, 8, 131072, 1)
    assert (one_of_eight.H, one_of_eight.G, one_of_eight.V, one_of_eight.tp) == (16, 1, 16384, 8)
    assert {shape.L for shape in SHAPES} == {4096, 262144}
    assert set(OPERATORS) >= {"ssd", "convolution", "normalization", "activation", "experts", "cross_entropy"}


@pytest.mark.long
@pytest.mark.parametrize("arch", TARGETS)
def test_every_binary_is_as_it_must_be(arch):
    done = subprocess.run([sys.executable, AOT, "--arch", arch], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
