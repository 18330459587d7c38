"""Which form an operator takes for a tensor: its Triton kernels, or PyTorch's own operators.

One environment variable decides, `PLAIT_KERNELS`:

    auto    (default) Triton on a GPU, CUDA or ROCm, where triton is installed; PyTorch elsewhere
    triton  the same, but a missing triton is an error; on a CPU Triton's interpreter, if TRITON_INTERPRET=1
    torch   PyTorch everywhere: the reference, for a doubt

float64 is PyTorch's everywhere: it is the reference's own precision, and no tensor core is lost by it.
"""

import functools
import os
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Form", "form_and_reason", "form_of", "interpreted", "setting", "triton_version"]

Form = Literal["triton", "torch"]

SETTINGS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def form_of(tensor: Tensor) -> Form:
    """The form for operators whose principal input this is.

    Raises:
        UserError: `PLAIT_KERNELS` is none of auto, torch, triton; or it is triton and there is none.
    """
    return form_and_reason(tensor.device, tensor.dtype)[0]


def form_and_reason(device: torch.device, dtype: torch.dtype) -> tuple[Form, str]:
    """The form on a device in a dtype, and why, in a few words."""
    asked = setting()
    if asked == "torch":
        return "torch", "PLAIT_KERNELS=torch"
    if dtype not in DTYPES:
        return "torch", f"{str(dtype).removeprefix('torch.')} has no Triton kernels"
    if device.type not in ("cuda", "cpu"):
        return "torch", f"{device.type} has no Triton kernels"
    if device.type == "cpu":
        if asked != "triton":
            return "torch", "on a CPU"
        if not interpreted():
            return "torch", "on a CPU without TRITON_INTERPRET=1"
    if triton_version() is None:
        if asked == "triton":
            raise UserError(
                "PLAIT_KERNELS=triton, but triton cannot be imported: install it, or set auto or torch"
            )
        return "torch", "triton cannot be imported"
    return "triton", "interpreted" if device.type == "cpu" else "on a GPU"


def setting() -> str:
    """`PLAIT_KERNELS`: auto, torch or triton."""
    asked = os.environ.get("PLAIT_KERNELS", "auto")
    if asked not in SETTINGS:
        raise UserError(f"PLAIT_KERNELS={asked}: expected auto, torch or triton")
    return asked


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors.

    Triton reads `TRITON_INTERPRET` when a kernel's module is imported: it must stand in the environment
    when the process starts.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_version() -> str | None:
    """Of the triton that can be imported, or None. Not imported before it is asked for: it takes a while."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
