"""SSD's operators as launches of the kernels: what `operators.py` calls where the form is Triton's.

Shapes as in `operators.py`. A sequence's last chunk may be shorter than the others: it is masked, not padded.
"""

import torch
from torch import Tensor

from .grad_c import grad_c_kernel
from .grad_states import grad_states_kernel
from .grad_steps import grad_steps_kernel
from .grad_x import grad_x_kernel
from .launcher import Launcher, launcher_of
from .output import output_kernel
from .passing import passing_kernel
from .shapes import Shape, strides
from .states import states_kernel

__all__ = ["begin", "begin_backward", "finish", "finish_backward", "kept"]


def begin(
    x, dt_raw, A, B, dt_bias, documents, dt_low, dt_high, chunk_size, on: Launcher | None = None
):  # fmt: skip
    on = on or launcher_of(x.device)
    Q = chunk_size
    x, dt_raw, B = _narrow(x, Q), _narrow(dt_raw, Q), _narrow(B, Q)
    shape = Shape.of(x, B, Q)
    M, H, state = shape.M, shape.H, (shape.P, shape.N)
    dt, log_decay = _fp32(x, M, H, Q), _fp32(x, M, H, Q)
    decay, prefix, total = _fp32(x, M, H), _fp32(x, M, H), _fp32(x, shape.batch, H)
    entering, final = _fp32(x, M, H, *state), _fp32(x, shape.batch, H, *state)
    entry = on.choice("ssd_states", shape)
    fused = on.walks_over_chunks(shape, entry)
    on.run(
        states_kernel,
        entry,
        (shape.batch if fused else M) * H * shape.tiles(entry),
        (
            x,
            dt_raw,
            A,
            B,
            dt_bias,
            _documents(documents),
            dt,
            log_decay,
            decay,
            prefix,
            total,
            entering,
            final,
        ),
        (dt_low, dt_high, shape.L, shape.K, Q, H, shape.R, *strides(x), *dt_raw.stride()[:2], *strides(B)),
        P=shape.P,
        N=shape.N,
        FUSED=fused,
        DOCUMENTS=documents is not None,
        BIAS=dt_bias is not None,
        MODE=on.mode,
    )
    if not fused:
        _pass(on, shape, entering, decay, prefix, total, final, reverse=False)
    return dt, log_decay, decay, entering, prefix, total, final


def finish(
    x, dt, log_decay, B, C, D, entering, prefix, initial, documents, on: Launcher | None = None
):  # fmt: skip
    on = on or launcher_of(x.device)
    Q = dt.shape[2]
    x, B, C = _narrow(x, Q), _narrow(B, Q), _narrow(C, Q)
    shape = Shape.of(x, B, Q)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    entry = on.choice("ssd_output", shape)
    on.run(
        output_kernel,
        entry,
        shape.M * shape.H * shape.parts(entry) * shape.blocks(entry),
        (x, dt, log_decay, B, C, D, entering, prefix, initial, _documents(documents), y),
        (shape.L, shape.K, shape.Q, shape.H, shape.R, *strides(x), *strides(B), *strides(C)),
        P=shape.P,
        N=shape.N,
        INITIAL=initial is not None,
        BLOCK_N=shape.whole_state,
        DOCUMENTS=documents is not None,
        HAS_D=D is not None,
        MODE=on.mode,
    )
    return y


def finish_backward(
    grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, documents, send,
    on: Launcher | None = None,
):  # fmt: skip
    on = on or launcher_of(x.device)
    Q = dt.shape[2]
    grad_y, x, B, C = _narrow(grad_y, Q), _narrow(x, Q), _narrow(B, Q), _narrow(C, Q)
    documents = _documents(documents)
    shape = Shape.of(x, B, dt.shape[2])
    through, grad_CB, leaving, suffix, carried = kept_here = kept(x, dt, B, entering, on)
    entry = on.choice("ssd_grad_states", shape)
    fused = on.walks_over_chunks(shape, entry)
    total = torch.empty_like(carried[..., 0, 0])
    on.run(
        grad_states_kernel,
        entry,
        (shape.batch if fused else shape.M) * shape.H * shape.tiles(entry),
        (grad_y, log_decay, decay, C, documents, leaving, suffix, total, carried),
        (shape.L, shape.K, shape.Q, shape.H, shape.R, *strides(grad_y), *strides(C)),
        P=shape.P,
        N=shape.N,
        FUSED=fused,
        DOCUMENTS=documents is not None,
        MODE=on.mode,
    )
    if not fused:
        _pass(on, shape, leaving, decay, suffix, total, carried, reverse=True)

    entry = on.choice("ssd_grad_c", shape)
    splits = on.splits(shape)
    grad_C = torch.empty_like(_split(C, splits), memory_format=torch.contiguous_format)
    grad_D = _fp32(x, shape.M, shape.H, shape.parts(entry), shape.blocks(entry)) if D is not None else None
    on.run(
        grad_c_kernel,
        entry,
        shape.M * shape.G * shape.blocks(entry) * splits,
        (
            grad_y,
            x,
            dt,
            log_decay,
            B,
            C,
            entering,
            prefix,
            initial,
            documents,
            grad_C,
            grad_D,
            grad_CB,
            through,
        ),
        (
            *(shape.L, shape.K, shape.M, shape.Q, shape.H, shape.G, shape.R),
            shape.R * shape.parts(entry) // splits,
            *(*strides(grad_y), *strides(x), *strides(B), *strides(C)),
        ),
        P=shape.P,
        N=shape.N,
        INITIAL=initial is not None,
        BLOCK_N=shape.whole_state,
        DOCUMENTS=documents is not None,
        HAS_D=D is not None,
        MODE=on.mode,
    )
    grad_D = grad_D.sum((0, 2, 3)) if grad_D is not None else _fp32(x, shape.H)
    sent = carried.clone() if send else carried.new_empty(0)
    return _whole(grad_C, C), grad_D, sent, kept_here


def kept(x, dt, B, entering, on: Launcher | None = None) -> list[Tensor]:
    """Tensors for what `finish_backward` keeps: what the state entering says of the decays, dCB, the gradient
    of the state leaving each chunk from zero, the log-decay from there to the end, what reaches the start."""
    on = on or launcher_of(x.device)
    shape = Shape.of(x, B, dt.shape[2])
    M, H, Q = shape.M, shape.H, shape.Q
    return [
        _fp32(x, M, H, shape.parts(on.choice("ssd_grad_c", shape)), Q),
        x.new_empty(on.splits(shape), M, shape.G, Q, Q),
        torch.empty_like(entering),
        _fp32(x, M, H),
        _fp32(x, shape.batch, *entering.shape[1:]),
    ]


def begin_backward(
    kept, grad_final, grad_y, x, dt_raw, A, B, C, D, dt_bias, dt, log_decay, decay, entering, prefix, total,
    initial, documents, dt_low, dt_high, on: Launcher | None = None,
):  # fmt: skip
    on = on or launcher_of(x.device)
    through, grad_CB, leaving, suffix, carried = kept
    Q = dt.shape[2]
    grad_y, x, dt_raw = _narrow(grad_y, Q), _narrow(x, Q), _narrow(dt_raw, Q)
    B, C = _narrow(B, Q), _narrow(C, Q)
    documents = _documents(documents)
    shape = Shape.of(x, B, Q)
    M, H, splits = shape.M, shape.H, grad_CB.shape[0]
    entry = on.choice("ssd_grad_x", shape)
    parts, blocks = shape.parts(entry), shape.blocks(entry)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_B = torch.empty_like(_split(B, splits), memory_format=torch.contiguous_format)
    direct, rows = _fp32(x, M, H, parts, Q), _fp32(x, M, H, parts, blocks, Q)
    columns, passed, at_end = torch.empty_like(direct), torch.empty_like(direct), _fp32(x, M, H, parts)
    on.run(
        grad_x_kernel,
        entry,
        M * shape.G * blocks * splits,
        (
            *(grad_y, x, dt, log_decay, decay, B, C, D, entering, prefix, initial, leaving, suffix),
            *(
                grad_final.contiguous(),
                documents,
                grad_CB,
                grad_x,
                grad_B,
                direct,
                rows,
                columns,
                passed,
                at_end,
            ),
        ),
        (
            *(shape.L, shape.K, M, Q, H, shape.G, shape.R, shape.R * parts // splits),
            *(*strides(grad_y), *strides(x), *strides(B), *strides(C)),
        ),
        P=shape.P,
        N=shape.N,
        INITIAL=initial is not None,
        BLOCK_N=shape.whole_state,
        DOCUMENTS=documents is not None,
        HAS_D=D is not None,
        MODE=on.mode,
    )
    grad_dt = torch.empty_like(dt_raw, memory_format=torch.contiguous_format)
    grad_A, grad_bias = _fp32(x, M, H), _fp32(x, M, H)
    on.run(
        grad_steps_kernel,
        on.choice("ssd_grad_steps", shape),
        M * H,
        (
            *(dt_raw, dt, A, dt_bias, documents, direct, rows, columns, passed, at_end, through),
            *(grad_dt, grad_A, grad_bias),
        ),
        (dt_low, dt_high, shape.L, shape.K, Q, H, blocks, *dt_raw.stride()[:2]),
        PARTS_X=parts,
        PARTS_C=through.shape[2],
        DOCUMENTS=documents is not None,
        BIAS=dt_bias is not None,
        COLUMNS_Q=shape.block_q(entry),
    )
    grad_initial = torch.addcmul(carried, grad_final, torch.exp(total)[..., None, None])
    return grad_x, grad_dt, grad_A.sum(0), _whole(grad_B, B), grad_bias.sum(0), grad_initial


def _pass(on, shape, states, decay, edges, total, out, *, reverse: bool) -> None:
    entry = on.choice("ssd_passing", shape)
    size = shape.P * shape.N
    programs = shape.batch * shape.H * -(-size // entry["BLOCK"])
    numbers = (shape.K, shape.H, size)
    on.run(passing_kernel, entry, programs, (states, decay, edges, total, out), numbers, REVERSE=reverse)


def _narrow(tensor: Tensor, Q: int) -> Tensor:
    """The last dim's elements side by side, and a chunk's tokens within 31 bits of its first; else a copy."""
    fits = tensor.stride(-1) == 1 and tensor.stride(1) * Q < 2**31
    return tensor if fits else tensor.contiguous()


def _documents(documents: Tensor | None) -> Tensor | None:
    return documents.contiguous() if documents is not None else None


def _fp32(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)


def _split(tensor: Tensor, splits: int) -> Tensor:
    """One of it a split, in fp32 where there is more than one to add up."""
    return tensor[None] if splits == 1 else tensor.expand(splits, *tensor.shape).float()


def _whole(split: Tensor, like: Tensor) -> Tensor:
    return split[0] if split.shape[0] == 1 else split.sum(0).to(like.dtype)
