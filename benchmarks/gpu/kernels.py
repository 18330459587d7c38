"""Each launch of plait's kernels at a production shape: its time, and the bytes a second that it comes to."""

import time
from functools import partial
from typing import Any

import torch

from plait.kernels.compiling import SHAPES, Shape, compile_for
from plait.kernels.launches import OPERATORS
from plait.kernels.recording import recording
from plait.kernels.tables import arch_of

from .setting import Results, Setting
from .timed import measure

TINY = Shape("tiny", 1, 48, 2, 16, 1, 16, 32, 64, 32, Q=32, E=16, K=2)


def run(setting: Setting, results: Results) -> None:
    device = setting.device
    dtype = torch.float32 if setting.interpret else torch.bfloat16
    shapes = [TINY] if setting.tiny else [SHAPES[0], next(shape for shape in SHAPES if shape.E)]
    for shape in shapes:
        # The second shape is for what the first does not have.
        names = ("experts",) if shape.E and not setting.tiny else tuple(OPERATORS)
        for name in names:
            with torch.device(device):
                for number, call in enumerate(OPERATORS[name](shape, dtype, documents=(True,))):
                    assert isinstance(call, partial)
                    begin = time.perf_counter()
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    first = time.perf_counter() - begin
                    row: dict[str, Any] = {
                        "operator": name,
                        "call": f"{number + 1}: {call.func.__name__}",
                        "shape": shape.label,
                        # The first call of a shape compiles, or finds the binary in the cache.
                        "first_seconds": round(first, 2),
                        **measure(call, device, 0.1),
                    }
                    if not setting.interpret:
                        moved = _bytes(call, arch_of(device))
                        row |= {"bytes": moved, "terabytes_a_second": moved / row["ms"] / 1e9}
                    results.add("launches", row)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _bytes(call: partial, arch: str) -> int:
    """What its launches read and write if each tensor moves once."""
    with recording(arch) as launches:
        call()
    moved = 0
    for launch in launches:
        usage = compile_for(launch, arch)
        moved += launch.bytes_read(usage) + launch.bytes_written(usage)
    return moved
