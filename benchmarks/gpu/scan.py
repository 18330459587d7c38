"""The whole scan, forward and backward, from 2 K to 256 K tokens, against everybody who is installed.

B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length.
"""

import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from minimal_ssd import minimal
from torch import Tensor

from plait.kernels.ssd import ssd

from .setting import Results, Setting
from .timed import measure

Form = Callable[..., Tensor]
WITHOUT = "plait without Triton"
TOKENS = 32768
"""A batch's, up to the length where one sequence has more."""


def run(setting: Setting, results: Results) -> None:
    H, P, G, N = (2, 16, 1, 16) if setting.tiny else (128, 64, 8, 128)
    lengths = (32, 64) if setting.tiny else tuple(2048 << doubling for doubling in range(8))
    results.write("heads", {"H": H, "P": P, "G": G, "N": N})
    dtype = torch.float32 if setting.interpret else torch.bfloat16
    gone: set[str] = set()
    for L in lengths:
        B = 1 if setting.tiny else max(1, TOKENS // L)
        tensors = _inputs(setting.device, dtype, (B, L, H, P, G, N))
        reference: Tensor | None = None
        for name, form in _forms(setting):
            if name in gone:
                continue
            row: dict[str, Any] = {"form": name, "B": B, "L": L}
            # It must hold for the backward too.
            os.environ["PLAIT_KERNELS"] = "torch" if name == WITHOUT else "triton"
            form = partial(form, *tensors)
            try:
                with torch.no_grad():
                    y = form().float()
                if reference is None:
                    reference = y
                difference = (y - reference).abs().max() / reference.abs().max()
                row["difference"] = difference.item()
                del y
                with torch.no_grad():
                    row["forward"] = measure(form, setting.device)
                row["both"] = measure(partial(_both, form, tensors), setting.device)
            # A rival may not take a length, a shape or this device; that it did not is the result.
            except Exception as error:
                row["error"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                )
                row["traceback"] = traceback.format_exc()[-1500:]
                gone.add(name)
            results.add("scans", row)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _forms(setting: Setting) -> Iterator[tuple[str, Form]]:
    for Q in (32,) if setting.tiny else (128, 256):
        yield f"plait, Q {Q}", lambda *tensors, Q=Q: ssd(*tensors, chunk_size=Q)[0]
    try:
        ssd_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        theirs = ssd_combined.mamba_chunk_scan_combined
    except Exception as error:
        yield "mamba_ssm", _absent(error)
    else:
        yield "mamba_ssm, Q 256", lambda *tensors: theirs(*tensors, 256, dt_softplus=True)
    Q = 32 if setting.tiny else 256
    # A rehearsal without a GPU leaves out the compiler of C++ that this would need.
    compiled = minimal if setting.interpret else torch.compile(minimal, dynamic=False)
    yield "minimal, torch.compile", lambda *tensors: compiled(*tensors, Q=Q)
    yield WITHOUT, lambda *tensors: ssd(*tensors, chunk_size=64)[0]
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except Exception as error:
        yield "transformers", _absent(error)
    else:
        scan = inspect.unwrap(mamba2_chunk_scan)
        yield "transformers", lambda *tensors: scan(*tensors, chunk_size=Q, dt_softplus=True)


def _absent(error: Exception) -> Form:
    def form(*tensors: Tensor) -> Tensor:
        raise RuntimeError(f"not installed: {error}")

    return form


def _inputs(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tensor]:
    B, L, H, P, G, N = sizes
    torch.manual_seed(0)
    with torch.device(device):
        x, dt, A = (
            torch.randn(B, L, H, P, dtype=dtype),
            torch.randn(B, L, H) - 3,
            -torch.exp(torch.rand(H) * 2),
        )
        b, c = (torch.randn(B, L, G, N, dtype=dtype) / 4 for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, dt, A, b, c)]


def _both(form: Form, tensors: list[Tensor]) -> None:
    y = form()
    torch.autograd.grad(y, tensors, torch.ones_like(y))
