"""What `plait bench doctor` says: the device, the settings, and each operator's form."""

import os
from collections.abc import Iterator

import torch

from ..kernels import tables
from ..kernels.compile_cache import keep_in, look_at
from ..kernels.forms import form_and_reason, setting, triton_version

__all__ = ["report"]

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
OPERATORS = ("ssd", "convolution", "normalization", "activation", "experts", "cross_entropy")


def report() -> Iterator[str]:
    """Lines, two columns each."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    yield from _rows(_machine(device))
    yield ""
    yield from _rows([("operator", *(_name(dtype) for dtype in DTYPES)), *_forms(device)])


def _machine(device: torch.device) -> Iterator[tuple[str, ...]]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors = properties.multi_processor_count
        memory = properties.total_memory / 2**30
        yield "device", f"{properties.name}, {processors} multiprocessors, {memory:.0f} GiB"
        arch = tables.arch_of(device)
        known = tables.nearest(arch)
        yield "architecture", arch if known == arch else f"{arch}, which has no table: {known}'s serves"
        own = tables.own_table_path(arch)
        yield "table", f"{own}, before plait's {known}.json" if own.exists() else f"plait's {known}.json"
    else:
        yield "device", "CPU; torch sees no GPU here"
    kinds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    built = [f"{kind} {version}" for kind, version in kinds.items() if version]
    yield "torch", f"{torch.__version__}, built for {built[0] if built else 'CPU alone'}"
    yield "triton", triton_version() or "cannot be imported"
    yield "PLAIT_KERNELS", setting() + ("" if "PLAIT_KERNELS" in os.environ else ", since it is not set")
    cache = look_at(keep_in(None))
    place = "on this machine" if cache.on_this_machine else "shared by machines: set train.kernel_cache"
    can = "writable" if cache.writable else "NOT writable: set train.kernel_cache"
    yield "compile cache", f"{cache.path}; {can}; {cache.file_system or 'unknown file system'}, {place}"


def _forms(device: torch.device) -> Iterator[tuple[str, ...]]:
    for operator in OPERATORS:
        yield operator, *(": ".join(form_and_reason(device, dtype)) for dtype in DTYPES)
    yield "attention", *(_attention(device, dtype) for dtype in DTYPES)
    grouped = "torch: grouped_mm"
    yield "experts' products", grouped, grouped, "torch: a loop, since grouped_mm has no float64"


def _attention(device: torch.device, dtype: torch.dtype) -> str:
    from ..kernels.attention import flash

    if flash.fits(torch.empty(1, 1, 1, 64, dtype=dtype, device=device)):
        return "torch: flash attention over documents"
    return "torch: by blocks of queries"


def _rows(rows) -> Iterator[str]:
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
