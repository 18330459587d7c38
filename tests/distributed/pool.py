"""Ranks kept running for the tests of a session, and one rank to compare them with."""

import copy
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ranks
import torch

__all__ = ["OneRank", "Pool", "Pools", "Tree", "change", "ranks_of"]

Tree = dict[str, Any]

PATIENCE = 300.0
"""Seconds that a case may take before its ranks are killed."""


def change(tree: Tree, changes: Mapping[str, Any]) -> None:
    """Set values by their keys, as ``{"train.steps": 20}``."""
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value


class Pool:
    """A number of ranks; after a failure new ones take the place of the old."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._folder, self._world_size = folder, world_size
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1

    def run(self, case: dict[str, Any], patience: float = PATIENCE) -> list[Any]:
        """What each rank found.

        Raises:
            AssertionError: a rank failed, with its traceback; or they took too long.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        os.killpg(process.pid, signal.SIGCONT)
        process.stdin.write(json.dumps(case).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([self._answers], [], [], patience)
        answer = os.read(self._answers, 5) if ready else b""
        if not answer.startswith(b"done"):
            # The first to fail is the cause; the others' connections break.
            time.sleep(0.5)
            self.stop()
            errors = sorted(self._folder.glob(f"{case['name']}.error-*"))
            said = "\n".join(_describe(error) for error in errors[:1])
            raise AssertionError(said or f"{self._world_size} ranks gave no answer in {patience:.0f} s")
        # Each of gloo's threads looks a hundred times a second for what came: idle ranks would take a quarter
        # of the machine from those at work.
        os.killpg(process.pid, signal.SIGSTOP)
        files = [self._folder / f"{case['name']}-{rank}.pt" for rank in range(self._world_size)]
        found = [torch.load(file, weights_only=False) for file in files]
        for file in files:
            file.unlink()
        return found

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        # They have nothing to put away.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._answers)

    def _start(self) -> subprocess.Popen[bytes]:
        here = Path(ranks.__file__)
        self._answers, answers = os.pipe()
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(here),
                str(self._folder),
                str(self._world_size),
                str(answers),
            ],
            stdin=subprocess.PIPE,
            stderr=(self._folder / "stderr").open("ab"),
            env=os.environ | environment,
            pass_fds=[answers],
            start_new_session=True,
        )
        os.close(answers)
        return self._process


def _describe(error: Path) -> str:
    return f"rank {error.name.rpartition('-')[2]}:\n{error.read_text()}"


class Pools:
    """As many ranks as a layout has."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._pools: dict[int, Pool] = {}

    def __call__(self, program: str, tree: Tree, *, run_dir: Path | None = None, **options: Any) -> list[Any]:
        """What a program of `programs/` finds on each rank of the layout of a config.

        Args:
            run_dir: a folder of its own by default.
        """
        self._count += 1
        tree = _in_folder(tree, run_dir or self._folder / f"run-{self._count}")
        return self.run(program, ranks_of(tree), tree=tree, **options)

    def run(self, program: str, world_size: int, *, keep_groups: bool = False, **options: Any) -> list[Any]:
        """What a program finds on each of a number of ranks.

        Args:
            keep_groups: let the process groups of the case before stand.
        """
        self._count += 1
        pool = self._pools.get(world_size)
        if pool is None:
            folder = self._folder / f"ranks-{world_size}"
            folder.mkdir()
            pool = self._pools[world_size] = Pool(folder, world_size)
        case = {"name": str(self._count), "program": program, "options": options, "keep_groups": keep_groups}
        return pool.run(case)

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


class OneRank:
    """The same programs on one rank, in this process; what each found is kept for the next who asks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Any] = {}

    def __call__(self, program: str, tree: Tree, **options: Any) -> Any:
        """What a program finds on one rank, whatever the layout of the config."""
        tree = tree | {"parallel": {}}
        key = json.dumps([program, tree, options], sort_keys=True)
        if key not in self._found:
            folder = self._folder / f"run-{len(self._found)}"
            self._found[key] = self.run(program, tree, run_dir=folder, **options)
        return self._found[key]

    def run(self, program: str, tree: Tree, *, run_dir: Path, **options: Any) -> Any:
        """What it finds, in a given folder."""
        threads = torch.get_num_threads()
        # The ranks idle beside it; a second thread would wait for them more than it helps.
        torch.set_num_threads(1)
        try:
            tree = _in_folder(tree, run_dir)
            return ranks.run({"program": program, "options": {"tree": tree, **options}})
        finally:
            torch.set_num_threads(threads)


def ranks_of(tree: Tree) -> int:
    """Ranks of the layout of a config."""
    return math.prod(tree["parallel"].get(axis, 1) for axis in ("dp_replicate", "dp_shard", "sp", "tp"))


def _in_folder(tree: Tree, folder: Path) -> Tree:
    tree = copy.deepcopy(tree)
    tree["run"]["dir"] = str(folder)
    return tree
