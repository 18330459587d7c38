"""Runs trained once a session, in many layouts, for the tests that take them up or begin from them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from layouts import name
from pool import OneRank, Pools, Tree, ranks_of

__all__ = ["EVERY", "STEPS", "SavedRun", "SavedRuns", "shortened"]

STEPS, EVERY = 6, 3

BEFORE, AFTER = 7, 8
"""Seeds of torch's generator in a run and in one that takes it up: only the checkpoint gives the same."""


class SavedRun(NamedTuple):
    folder: Path
    """With checkpoints at `EVERY` and `STEPS`."""
    found: list[dict[str, Any]]
    """What each rank found, see programs/resuming.py."""

    @property
    def parts(self) -> list[Any]:
        """What each rank held at `EVERY`."""
        return [rank["states"][EVERY]["parts"] for rank in self.found]

    @property
    def last_parts(self) -> list[Any]:
        """What each rank held at `STEPS`."""
        return [rank["states"][STEPS]["parts"] for rank in self.found]

    def cut_back(self, target: Path) -> Path:
        """A copy of the folder as it was at `EVERY`."""
        shutil.copytree(self.folder, target)
        shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08d}")
        assert [path.name for path in (target / "checkpoints").glob("step-*")] == [f"step-{EVERY:08d}"]
        return target


class SavedRuns:
    """An undisturbed run of `STEPS` steps in any layout, each trained when it is first asked for."""

    def __init__(self, folder: Path, ranks: Pools, one_rank: OneRank) -> None:
        self._folder, self._ranks, self._one_rank = folder, ranks, one_rank
        self._runs: dict[str, SavedRun] = {}

    def __call__(self, tree: Tree) -> SavedRun:
        """The run of a config that `shortened` made."""
        key = f"{tree['train']['dtype']}-{name(tree['parallel'])}"
        if key not in self._runs:
            folder = self._folder / key
            self._runs[key] = SavedRun(folder, self.train(tree, folder, seed=BEFORE))
        return self._runs[key]

    def train(self, tree: Tree, folder: Path, *, seed: int = AFTER, **options: Any) -> list[dict[str, Any]]:
        """What each rank finds that trains, or goes on, in a folder."""
        options |= {"seed": seed, "run_dir": folder}
        if ranks_of(tree) == 1:
            return [self._one_rank.run("resuming", tree, **options)]
        return self._ranks("resuming", tree, **options)


def shortened(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that make a config one of these runs'."""
    short = {"train.steps": STEPS, "checkpoint.every": EVERY, "evaluate.every": EVERY}
    return {**short, "model.moe.score_bias_rate": 0.01, **changes}
