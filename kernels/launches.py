"""Every kernel's launches at a shape: what is compiled ahead of time, warmed up, and reckoned with.

Each operator is called on meta tensors of the shapes and dtypes that a hybrid's training step gives it, forward
and backward, with documents and a state entering.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width, V vocabulary,
E experts, K experts a token, F hidden width, T tokens, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .compiling import Compilation, Shape
from .recording import recording

__all__ = ["OPERATORS", "launches"]

PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
}
"""Multiprocessors of each architecture's largest card: A100, A40, L40, H100, B200, RTX PRO 6000, MI300X."""
CHUNK_TOKENS = 1024
"""Tokens of logits that cross-entropy makes at once here; the kernels take any number."""


def launches(
    shape: Shape, arch: str, operators: tuple[str, ...] | None = None, dtype: torch.dtype = torch.bfloat16
) -> list[Compilation]:
    """What the operators (all by default) launch at a shape, in order, once for each binary."""
    found: dict[tuple, Compilation] = {}
    for name in operators or tuple(OPERATORS):
        with recording(arch) as written, torch.device("meta"):
            OPERATORS[name](shape, arch, dtype)
        for launch in written:
            found.setdefault(launch.binary, launch)
    return list(found.values())


def _ids(shape: Shape) -> Tensor:
    return torch.empty(shape.B, shape.L, dtype=torch.int32)


def _ssd(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    from .ssd.triton import launch
    from .ssd.triton.launcher import Launcher

    B, L, H = shape.B, shape.L, shape.H
    mode = "ieee" if arch.startswith("gfx") else "tf32x3"
    on = Launcher(arch, PROCESSORS[arch], mode, torch.device("meta"))
    x, y = (torch.empty(B, L, H, shape.P, dtype=dtype) for _ in range(2))
    b, c = (torch.empty(B, L, shape.G, shape.N, dtype=dtype) for _ in range(2))
    step, A, D, bias = torch.empty(B, L, H), torch.empty(H), torch.empty(H), torch.empty(H)
    state = torch.empty(B, H, shape.P, shape.N)
    limit, ids = (0.0, float("inf")), _ids(shape)
    for documents, initial in ((ids, state), (None, None)):
        dt, log_decay, decay, entering, prefix, total, _ = launch.begin(
            x, step, A, b, bias, documents, *limit, min(shape.Q, L), on
        )
        launch.finish(x, dt, log_decay, b, c, D, entering, prefix, initial, documents, on)
        *_, kept = launch.finish_backward(
            y, x, dt, log_decay, decay, b, c, D, entering, prefix, initial, documents, False, on
        )
        scan = dt, log_decay, decay, entering, prefix, total
        launch.begin_backward(
            kept, state, y, x, step, A, b, c, D, bias, *scan, initial, documents, *limit, on
        )


def _convolution(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    from .convolution import triton

    for channels in (shape.d_inner, shape.G * shape.N):
        x = torch.empty(shape.B, shape.L, channels, dtype=dtype)
        weight, bias = (
            torch.empty(channels, shape.d_conv, dtype=dtype),
            torch.empty(channels, dtype=dtype),
        )
        halo = torch.empty(shape.B, shape.d_conv - 1, channels, dtype=dtype)
        for before, ids in ((None, None), (halo, _ids(shape))):
            triton.forward(x, weight, bias, before, ids, True)
            triton.backward(torch.empty_like(x), x, weight, bias, before, ids, True)


def _normalization(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    from .normalization import triton

    x = torch.empty(shape.tokens, shape.D, dtype=dtype)
    _, r = triton.forward(x, None, torch.empty(shape.D, dtype=dtype), 1e-5, 1)
    triton.backward(x, x, None, torch.empty(shape.D, dtype=dtype), r)
    x, z = (torch.empty(shape.tokens, shape.d_inner, dtype=dtype) for _ in range(2))
    weight = torch.empty(shape.d_inner, dtype=dtype)
    _, r = triton.forward(x, z, weight, 1e-5, shape.G)
    triton.backward(x, x, z, weight, r)
    # Where ranks share a group, its sums are made apart.
    width = shape.d_inner // shape.G
    x, z, r = x[:, :width].contiguous(), z[:, :width].contiguous(), r[:, :1].contiguous()
    triton.squares(x, z)
    triton.output(x, z, weight[:width], r)
    triton.dot_products(x, x, z, weight[:width], r)
    triton.gradients(x, x, z, weight[:width], r, r)


def _activation(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    from .activation import triton

    x = torch.empty(shape.tokens, shape.F, dtype=dtype)
    triton.squared_relu_backward(triton.squared_relu(x), x)
    triton.swiglu_backward(triton.swiglu(x, x), x, x)


def _experts(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    if not shape.E:
        return
    from .experts import triton

    x = torch.empty(shape.tokens, shape.D, dtype=dtype)
    inverse = torch.empty(shape.tokens, shape.K, dtype=torch.int64)
    weight = torch.empty(shape.tokens, shape.K)
    rows = triton.dispatch(x, inverse)
    triton.dispatch_backward(rows, inverse)
    triton.combine_backward(triton.combine(rows, weight, inverse), rows, weight, inverse)


def _cross_entropy(shape: Shape, arch: str, dtype: torch.dtype) -> None:
    from .cross_entropy import triton

    logits = torch.empty(CHUNK_TOKENS, shape.V, dtype=dtype)
    targets = torch.empty(CHUNK_TOKENS, dtype=torch.int64)
    lse, _ = triton.reduce_logits(logits, targets, 0)
    triton.write_gradient(logits, targets, lse, 1e-4, 0)


OPERATORS: dict[str, Callable[[Shape, str, torch.dtype], None]] = {
    "ssd": _ssd,
    "convolution": _convolution,
    "normalization": _normalization,
    "activation": _activation,
    "experts": _experts,
    "cross_entropy": _cross_entropy,
}
