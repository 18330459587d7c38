"""Whatever moment a process dies at while it saves, the newest whole checkpoint loads."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_a_death_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crashes.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    deaths = re.fullmatch(
        r"survived (\d+) deaths saving a step anew, (\d+) saving the next, 20 kills\n", ran.stdout
    )
    assert deaths, ran.stdout
    # A save makes a folder, three files and a rename, then deletes what it replaces: many moments to die.
    assert min(int(deaths[1]), int(deaths[2])) > 15
