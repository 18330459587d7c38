"""What stands here: device, versions, and which form each operator takes."""

import platform
from datetime import date

import numpy
import torch
import triton

from .setting import Results, Setting


def run(setting: Setting, results: Results) -> None:
    results.write("date", str(date.today()))
    results.write("python", platform.python_version())
    results.write("torch", torch.__version__)
    results.write("triton", triton.__version__)
    results.write("numpy", numpy.__version__)
    results.write("cuda", torch.version.cuda)
    results.write("hip", torch.version.hip)
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        results.write("device", properties.name)
        results.write("memory_gib", round(properties.total_memory / 2**30, 1))
        results.write("multiprocessors", properties.multi_processor_count)
        results.write("l2_mib", round(getattr(properties, "L2_cache_size", 0) / 2**20, 1))
    from plait.launch.bench_doctor import report

    results.write("doctor", list(report()))
