"""Run by test_crashes.py: processes that die while they save.

Torch is imported once; each process that is to die is a fork, so that hundreds of deaths take seconds.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from plait.pretrain.checkpoint import Checkpoints

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def save(folder: Path, step: int, value: int, keep: int, background: bool) -> None:
    checkpoints = Checkpoints(folder, keep=keep, background=background)
    tensors = {name: torch.full((50, 40), float(value)) for name in ("a", "b", "c")}
    checkpoints.save(step, tensors, {"value": value})
    checkpoints.wait()


def newest_value(folder: Path) -> int:
    checkpoint = Checkpoints(folder).newest()
    assert checkpoint is not None, f"no whole checkpoint left in {sorted(os.listdir(folder))}"
    checkpoint.verify()
    tensors = {name: torch.zeros(50, 40) for name in ("a", "b", "c")}
    checkpoint.load_into(tensors)
    value = checkpoint.manifest.facts["value"]
    assert all((tensor == value).all() for tensor in tensors.values())
    return value


def fork(work: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return process


def die_before_operation(number: int) -> None:
    """Arm this process: its `number`-th file operation from now on does not happen, nor anything after."""
    left = number

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in FILE_OPERATIONS:
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(count)


def die_everywhere(folder: Path, step: int) -> int:
    """Step 7 is saved; save `step` over or after it, keeping one, dying before each operation in turn."""
    deaths = 0
    while True:
        value = deaths + 1
        save(folder, 7, value, 1, False)

        def work(value: int = value, number: int = deaths + 1) -> None:
            die_before_operation(number)
            save(folder, step, -value, 1, False)

        _, status = os.waitpid(fork(work), 0)
        assert newest_value(folder) in (value, -value)
        if status == 0:
            assert newest_value(folder) == -value
            return deaths
        assert os.waitstatus_to_exitcode(status) == 9
        deaths += 1


def kill_at_random(folder: Path, kills: int) -> None:
    """A run that saves in the background, over and over, and is killed and started again."""
    chance = random.Random(0)
    save(folder, 1, 1, 2, True)
    for _ in range(kills):
        before = newest_value(folder)

        def run(before: int = before) -> None:
            for value in range(before + 1, before + 1000):
                save(folder, value // 2, value, 2, True)

        process = fork(run)
        time.sleep(chance.uniform(0.005, 0.15))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert newest_value(folder) >= before


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    same = die_everywhere(folder / "same", 7)
    following = die_everywhere(folder / "following", 8)
    kill_at_random(folder / "random", 20)
    print(f"survived {same} deaths saving a step anew, {following} saving the next, 20 kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
