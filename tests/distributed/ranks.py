"""The ranks of a test: processes that run one program after the other and write down what each found.

    python ranks.py FOLDER RANKS ANSWERS

A line of standard input is a case, JSON: its name, its program (a module of `programs/` with a `run`) and
the program's options. Rank r writes FOLDER/NAME-r.pt; when all have, a line goes to the file descriptor
ANSWERS. The ranks live until standard input ends, and are forks of one process, because importing torch
takes longer than most cases.
"""

import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch's optimizers import at their first use, and each fork anew
import torch.distributed as dist

import plait.pretrain.callbacks
import plait.pretrain.trainer  # noqa: F401  so that the forks have it


def run(case: dict[str, Any]) -> Any:
    """What this rank finds."""
    return importlib.import_module(f"programs.{case['program']}").run(**case["options"])


def join(folder: Path, name: str, rank: int, world_size: int) -> None:
    store = dist.FileStore(str(folder / f"{name}.store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def serve(folder: Path, rank: int, world_size: int, cases: int, answers: int) -> None:
    """Run the cases that come, until no more do."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    for line in os.fdopen(cases):
        case = json.loads(line)
        name = case["name"]
        try:
            # What is not initialised is NaN here too.
            torch.use_deterministic_algorithms(True)
            if not (dist.is_initialized() and case["keep_groups"]):
                if dist.is_initialized():
                    # A group that something still refers to keeps its threads, which wake all the time.
                    gc.collect()
                    dist.destroy_process_group()
                join(folder, name, rank, world_size)
            torch.save(run(case), folder / f"{name}-{rank}.pt")
            dist.barrier()
        except BaseException:
            # A rank that fails leaves the others waiting: all end here, and this one says why.
            (folder / f"{name}.error-{time.time_ns()}-{rank}").write_text(traceback.format_exc())
            os.write(answers, b"failed\n")
            os._exit(1)
        if rank == 0:
            os.write(answers, b"done\n")
    os._exit(0)


def main(folder: Path, world_size: int, answers: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    # What no fork's collector touches is shared by all.
    gc.collect()
    gc.freeze()
    pipes = []
    for rank in range(world_size):
        reading, writing = os.pipe()
        if os.fork() == 0:
            # A rank ends when nobody else can write to its pipe.
            for pipe in (*pipes, writing):
                os.close(pipe)
            serve(folder, rank, world_size, reading, answers)
        os.close(reading)
        pipes.append(writing)
    for line in sys.stdin:
        for pipe in pipes:
            os.write(pipe, line.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
