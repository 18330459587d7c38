"""Run by test_peaks.py, in a process of its own: how far memory rises above what stands when a load is done.

    python peaks.py '[["train", CONFIG], ["load", RUN, DTYPE], …]'

Prints, for each, the bytes of the peak above the end, and of the end above the beginning, as JSON.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from plait.pretrain.config_file import load_config
from plait.pretrain.loading import load_run
from plait.pretrain.trainer import Trainer


def resident(what: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def measure(kind: str, where: str, *dtype: str) -> tuple[int, int]:
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    held = Trainer(load_config(where)) if kind == "train" else load_run(where, dtype=dtype[0])
    found = resident("VmHWM") - resident(), resident() - before
    if isinstance(held, Trainer):
        held.close()
    del held
    gc.collect()
    return found


def main(jobs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    # What the first use of a library takes for good is no matter of loading.
    measure(*jobs[0])
    print(json.dumps([measure(*job) for job in jobs]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
