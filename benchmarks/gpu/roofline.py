"""What the device gives at its best: bytes copied and bf16 products a second."""

import torch

from .setting import Results, Setting
from .timed import measure


def run(setting: Setting, results: Results) -> None:
    device = setting.device
    for megabytes in (1,) if setting.tiny else (256, 1024, 4096):
        source = torch.zeros(megabytes << 18, device=device)
        target = torch.empty_like(source)
        time = measure(lambda source=source, target=target: target.copy_(source), device)
        moved = 2 * source.numel() * 4
        results.add(
            "copies", {"megabytes": megabytes, **time, "terabytes_a_second": moved / time["ms"] / 1e9}
        )
    for n in (64,) if setting.tiny else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
        time = measure(lambda a=a, b=b: a @ b, device)
        results.add("products", {"n": n, **time, "teraflops": 2 * n**3 / time["ms"] / 1e9})
    results.write("terabytes_a_second", max(row["terabytes_a_second"] for row in results.values["copies"]))
    results.write("teraflops", max(row["teraflops"] for row in results.values["products"]))
