"""interpreted_ssd.py in a process of its own: Triton reads `TRITON_INTERPRET` when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WHOLE = {"block_q": 32, "block_p": 32, "num_warps": 4, "num_stages": 1}
BLOCKS = {
    "ssd_states": {**WHOLE, "block_n": 16},
    "ssd_passing": {"block": 512, "num_warps": 4, "num_stages": 1},
    "ssd_output": WHOLE,
    "ssd_grad_states": {**WHOLE, "block_n": 16},
    "ssd_grad_c": {**WHOLE, "block_p": 64},
    "ssd_grad_x": WHOLE,
    "ssd_grad_steps": {"block_q": 32, "num_warps": 2, "num_stages": 1},
}


def run(tmp_path: Path, *arguments: str) -> None:
    table = tmp_path / ".config" / "plait" / "kernels" / "sm_80.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"kernels": {name: [entry] for name, entry in BLOCKS.items()}}))
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "TRITON_INTERPRET": "1",
        "PLAIT_KERNELS": "triton",
        "OMP_NUM_THREADS": "1",
    }
    file = Path(__file__).with_name("interpreted_ssd.py")
    command = [sys.executable, "-m", "pytest", str(file), "--tb=short", "--durations=12", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def test_in_the_interpreter(tmp_path: Path) -> None:
    run(tmp_path)


@pytest.mark.long
def test_in_the_interpreter_for_longer(tmp_path: Path) -> None:
    run(tmp_path, "-m", "long")
