"""interpreted_hot_path.py in a process of its own: Triton reads `TRITON_INTERPRET` when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

BLOCKS = {
    "convolution_forward": {"span": 4, "block": 16, "num_warps": 1, "num_stages": 2},
    "convolution_backward": {"span": 4, "block": 16, "num_warps": 1, "num_stages": 2},
    "normalization_forward": {"elements": 128, "num_warps": 1},
    "normalization_backward": {"elements": 128, "programs": 2, "num_warps": 1},
    "activation": {"block": 64, "num_warps": 1},
    "experts_choose": {"elements": 64, "num_warps": 1},
    "experts": {"block": 16, "num_warps": 1},
    "cross_entropy_reduce": {"block": 16, "num_warps": 1, "num_stages": 2},
    "cross_entropy_gradient": {"block": 16, "num_warps": 1},
}


def test_in_the_interpreter(tmp_path: Path) -> None:
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
    file = Path(__file__).with_name("interpreted_hot_path.py")
    command = [sys.executable, "-m", "pytest", str(file), "--tb=short", "--durations=5"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]
