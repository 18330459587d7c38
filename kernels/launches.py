"""Every kernel's launches at a shape: what is compiled ahead of time, warmed up, and reckoned with.

Each operator is called on tensors of the shapes and dtypes that a hybrid's training step gives it, forward
and backward, with documents and a state entering, and without.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width, V vocabulary,
E experts, K experts a token, F hidden width, T tokens, C channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compiling import Compilation, Shape
from .recording import recording
from .tables import nearest

if TYPE_CHECKING:
    from .ssd.triton.launcher import Launcher

__all__ = ["OPERATORS", "Run", "launches"]

Run = Callable[[], object]

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
    shape: Shape,
    arch: str,
    operators: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    processors: int | None = None,
    documents: bool | None = None,
) -> list[Compilation]:
    """What the operators (all by default) launch at a shape, in order, once for each binary.

    Args:
        documents: with documents (and a state that enters) or without them; None is both, apart.
    """
    from .ssd.triton.launcher import Launcher

    mode = "ieee" if arch.startswith("gfx") else "tf32x3"
    on = Launcher(arch, processors or PROCESSORS[nearest(arch)], mode, torch.device("meta"))
    found: dict[tuple, Compilation] = {}
    for name in operators or OPERATORS:
        with recording(arch) as written, torch.device("meta"):
            for run in OPERATORS[name](
                shape, dtype, on, (True, False) if documents is None else (documents,)
            ):
                run()
        for launch in written:
            found.setdefault(launch.binary, launch)
    return list(found.values())


def _drawn(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, dtype=dtype)


def _ids(shape: Shape) -> Tensor:
    """Four documents a row."""
    ids = torch.arange(shape.L, dtype=torch.int32) // max(1, -(-shape.L // 4))
    return ids.expand(shape.B, -1).contiguous()


def _ssd(
    shape: Shape, dtype: torch.dtype, on: "Launcher | None" = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    from .ssd.triton import launch

    B, L, H = shape.B, shape.L, shape.H
    x, grad_y = (_drawn(B, L, H, shape.P, dtype=dtype) for _ in range(2))
    b, c = (_drawn(B, L, shape.G, shape.N, dtype=dtype) for _ in range(2))
    step, D, bias = torch.randn(B, L, H), torch.randn(H), torch.zeros(H)
    A, state = -torch.ones(H), torch.randn(B, H, shape.P, shape.N)
    limit, Q = (0.0, math.inf), min(shape.Q, L)
    for packed in documents:
        ids, initial = (_ids(shape), state) if packed else (None, None)
        begin = partial(launch.begin, x, step, A, b, bias, ids, *limit, Q, on)
        dt, log_decay, decay, entering, prefix, total, _ = begin()
        yield begin
        scan = x, dt, log_decay
        yield partial(launch.finish, *scan, b, c, D, entering, prefix, initial, ids, on)
        finish = partial(
            launch.finish_backward,
            *(grad_y, *scan, decay, b, c, D, entering, prefix, initial, ids, False, on),
        )
        *_, kept = finish()
        yield finish
        given = grad_y, x, step, A, b, c, D, bias, dt, log_decay, decay, entering, prefix, total
        yield partial(launch.begin_backward, kept, state, *given, initial, ids, *limit, on)


def _convolution(
    shape: Shape, dtype: torch.dtype, on: object = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    from .convolution import triton

    for channels in (shape.d_inner, shape.G * shape.N):
        x, grad = (_drawn(shape.B, shape.L, channels, dtype=dtype) for _ in range(2))
        weight, bias = _drawn(channels, shape.d_conv, dtype=dtype), _drawn(channels, dtype=dtype)
        halo = _drawn(shape.B, shape.d_conv - 1, channels, dtype=dtype)
        for packed in documents:
            before, ids = (halo, _ids(shape)) if packed else (None, None)
            yield partial(triton.forward, x, weight, bias, before, ids, True)
            yield partial(triton.backward, grad, x, weight, bias, before, ids, True)


def _normalization(
    shape: Shape, dtype: torch.dtype, on: object = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    from .normalization import triton

    x, weight = _drawn(shape.tokens, shape.D, dtype=dtype), _drawn(shape.D, dtype=dtype)
    yield partial(triton.forward, x, None, weight, 1e-5, 1)
    yield partial(triton.backward, x, x, None, weight, torch.ones(shape.tokens, 1, 1))
    yield partial(triton.add_forward, x, torch.empty_like(x), weight, 1e-5)
    yield partial(triton.add_backward, x, x, torch.empty_like(x), weight, torch.ones(shape.tokens, 1, 1))
    x, z = (_drawn(shape.tokens, shape.d_inner, dtype=dtype) for _ in range(2))
    weight, r = _drawn(shape.d_inner, dtype=dtype), torch.ones(shape.tokens, shape.G, 1)
    yield partial(triton.forward, x, z, weight, 1e-5, shape.G)
    yield partial(triton.backward, x, x, z, weight, r)
    # Where ranks share a group, its sums are made apart.
    width = shape.d_inner // shape.G
    x, z, r = x[:, :width].contiguous(), z[:, :width].contiguous(), r[:, :1].contiguous()
    weight = weight[:width]
    yield partial(triton.squares, x, z)
    yield partial(triton.output, x, z, weight, r)
    yield partial(triton.dot_products, x, x, z, weight, r)
    yield partial(triton.gradients, x, x, z, weight, r, r)


def _activation(
    shape: Shape, dtype: torch.dtype, on: object = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    from .activation import triton

    x = _drawn(shape.tokens, shape.F, dtype=dtype)
    yield partial(triton.squared_relu, x)
    yield partial(triton.squared_relu_backward, x, x)
    yield partial(triton.swiglu, x, x)
    yield partial(triton.swiglu_backward, x, x, x)


def _experts(
    shape: Shape, dtype: torch.dtype, on: object = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    if not shape.E:
        return
    from .experts import triton

    x = _drawn(shape.tokens, shape.D, dtype=dtype)
    rows = _drawn(shape.tokens * shape.K, shape.D, dtype=dtype)
    # Each token's rows lie far from each other, as they do when sorted by expert.
    inverse = torch.arange(shape.tokens * shape.K).view(shape.K, shape.tokens).t().contiguous()
    weight = torch.ones(shape.tokens, shape.K)
    # In one group, as both published models choose, and as DeepSeek-V3 does.
    for groups in (1, 8):
        choose = (
            torch.ones(shape.tokens, shape.E),
            torch.zeros(shape.E),
            shape.K,
            groups,
            max(1, groups // 2),
        )
        yield partial(triton.choose, *choose)
    yield partial(triton.dispatch, x, inverse)
    yield partial(triton.dispatch_backward, rows, inverse)
    yield partial(triton.combine, rows, weight, inverse)
    yield partial(triton.combine_backward, x, rows, weight, inverse)


def _cross_entropy(
    shape: Shape, dtype: torch.dtype, on: object = None, documents: Sequence[bool] = (True, False)
) -> Iterator[Run]:
    from .cross_entropy import triton

    tokens = min(CHUNK_TOKENS, shape.tokens)
    logits, targets = _drawn(tokens, shape.V, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    yield partial(triton.reduce_logits, logits, targets, 0)
    yield partial(triton.write_gradient, logits, targets, torch.zeros(tokens), 1e-4, 0)


OPERATORS: dict[str, Callable[..., Iterator[Run]]] = {
    "ssd": _ssd,
    "convolution": _convolution,
    "normalization": _normalization,
    "activation": _activation,
    "experts": _experts,
    "cross_entropy": _cross_entropy,
}
"""Calls of an operator's kernels at a shape, on torch's default device, in the order of a training step. Of
a shape, a dtype, SSD's launcher (None for the device's own), and whether there are documents, one or both."""
