"""interpreted_training.py in a process of its own: Triton reads `TRITON_INTERPRET` when it is imported."""

import os
import subprocess
import sys
from pathlib import Path


def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name("interpreted_training.py")
    command = [sys.executable, "-m", "pytest", str(file), "--tb=short", "-v"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "1 passed" in run.stdout, run.stdout[-2000:]
