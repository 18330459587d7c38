"""The short form of `make chaos`."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chaos import KINDS, run

EVENTS = [("rename", "one rank"), ("between commands", "a bit flipped")]


def test_a_disturbed_run_ends_as_one_that_nobody_disturbed(tmp_path):
    assert set(EVENTS) < set(KINDS)
    rows, _ = run(EVENTS, random.Random(0), tmp_path)
    assert [(row.moment, row.faults) for row in rows] == [
        *((moment, []) for moment, _ in EVENTS),
        ("the end", []),
    ]
    # A checkpoint is not there before its rename, and a missing file takes one with it.
    assert all(row.resumed is not None and row.resumed < row.before for row in rows[:2])
