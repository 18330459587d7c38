"""Ten runs of every operator, forward and backward: the same bits.

Under torch's own switch for it: without it the library's attention adds up by atomics in its backward.
"""

import os

import torch

from .correctness import compute
from .operators import cases
from .setting import Results, Setting

RUNS = 10


def run(setting: Setting, results: Results) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    runs = 2 if setting.tiny else RUNS
    wrong = 0
    dtype = torch.float32 if setting.interpret else torch.bfloat16
    for case in cases(setting.device, tiny=setting.tiny):
        given = {
            name: tensor.to(dtype if name in case.low else torch.float32)
            for name, tensor in case.inputs.items()
        }
        first = compute(case.run, given)
        differing = set()
        for _ in range(runs - 1):
            again = compute(case.run, given)
            differing |= {name for name in first if not torch.equal(first[name], again[name])}
        wrong += bool(differing)
        results.add("operators", {"operator": case.name, "runs": runs, "differing": sorted(differing)})
    if wrong:
        raise SystemExit(f"{wrong} operators do not give the same bits twice")
