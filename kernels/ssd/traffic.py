"""Bytes and FLOPs of the scan's kernels by their block sizes, and of mamba_ssm's counted the same way.

A kernel's time is the longer of two: its bytes, each tensor once, since what programs share is met in the
L2 cache, by the memory's bandwidth; and its products, masked parts included, by the tensor cores' speed. What
moves between L2 and the multiprocessors is counted too, but not turned into a time: vendors give no speed.

Shapes: T tokens, H heads, P head dim, G groups, N state size, Q chunk length, S elements of all states.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..compiling import Compilation, Shape, Usage
from ..devices import GPU

__all__ = ["Pass", "floor", "mamba_ssm", "ours"]


@dataclass(frozen=True)
class Pass:
    """One launch."""

    name: str
    bytes_read: float
    bytes_written: float
    flops: float
    through_cache: float | None = None
    """Bytes that programs load, those from L2 among them; None where block sizes are not known."""
    forward: bool = True

    def seconds(self, gpu: GPU) -> float:
        return gpu.seconds(self.bytes_read + self.bytes_written, self.flops)


def ours(launches: list[tuple[Compilation, Usage]], shape: Shape) -> list[Pass]:
    """The passes of plait's kernels, as they would be launched."""
    passes, forward = [], True
    for launch, usage in launches:
        # The kernel that passes states on serves both ways; what comes after the output is the backward.
        flops, loads = _products(launch, shape)
        passes.append(
            Pass(
                launch.name,
                launch.bytes_read(usage),
                launch.bytes_written(usage),
                flops,
                loads,
                forward,
            )
        )
        forward = forward and launch.name != "ssd.output"
    return passes


def _products(launch: Compilation, shape: Shape) -> tuple[int, int]:
    """FLOPs, and bytes that the programs load."""
    name, constants = launch.name, launch.constants
    if "BLOCK_Q" not in constants or name == "ssd.grad_steps":
        return 0, sum(launch.sizes.values())
    BQ, BP, BN, P = (constants[key] for key in ("BLOCK_Q", "BLOCK_P", "BLOCK_N", "P"))
    Q = min(shape.Q, shape.L)
    chunks = shape.B * -(-shape.L // Q)
    blocks, parts = -(-Q // BQ), -(-P // BP)
    pairs = blocks * (blocks + 1) // 2
    e = 2 if launch.signature["B" if "B" in launch.signature else "C"] == "*bf16" else 4
    heads = chunks * shape.H * parts
    if name in ("ssd.states", "ssd.grad_states"):
        tiles = -(-constants["N"] // BN)
        return heads * tiles * blocks * 2 * BQ * BP * BN, heads * tiles * blocks * BQ * (BP + BN) * e
    state = 4 * BP * BN * (2 if constants["INITIAL"] else 1)
    if name == "ssd.output":
        flops = heads * (blocks * 2 * BQ * BN * BP + pairs * 2 * BQ * BQ * (BN + BP))
        return flops, heads * (blocks * (state + BQ * BN * e) + pairs * BQ * (BN + BP) * e)
    # Heads of a group share a program; where groups are few, several share them out.
    groups = launch.programs // blocks
    once = groups * pairs * 2 * BQ * BQ * BN
    if name == "ssd.grad_c":
        flops = heads * (blocks * 2 * BQ * BP * BN + pairs * 2 * BQ * BQ * BP) + once
        loads = heads * (blocks * (state + 2 * BQ * BP * e) + pairs * 2 * BQ * BP * e)
        return flops, loads + groups * (blocks + pairs) * BQ * BN * e
    if name == "ssd.grad_x":
        flops = heads * (blocks * 4 * BQ * BP * BN + pairs * 2 * BQ * BQ * (BN + 2 * BP)) + once
        loads = heads * (blocks * (8 * BP * BN + 2 * BQ * BP * e) + state + pairs * BQ * (BN + BP) * e)
        return flops, loads + groups * (blocks * BQ * BN + pairs * BQ * (BQ + BN)) * e
    raise KeyError(f"{name}: its products are not counted")


def floor(shape: Shape) -> tuple[Pass, Pass]:
    """Forward and backward if every input were read once and every output written once."""
    x, bc, steps, _, _ = _sizes(shape)
    inside, through = _floor_products(shape)
    return (
        Pass("floor, forward", x + 2 * bc + steps, x, inside[0] + through[0]),
        Pass(
            "floor, backward",
            2 * x + 2 * bc + steps,
            x + 2 * bc + steps,
            inside[1] + through[1],
            forward=False,
        ),
    )


def _floor_products(shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Causal products within chunks, and those with states, of forward and backward."""
    T, Q = shape.tokens, min(shape.Q, shape.L)
    CB, tile = T * Q * shape.G * shape.N, T * Q * shape.d_inner
    state = 2 * T * shape.d_inner * shape.N
    return (CB + tile, 3 * CB + 2 * tile), (2 * state, 5 * state)


def _sizes(shape: Shape) -> tuple[float, float, float, float, float]:
    """Bytes of x, of B or C, of an fp32 a token and head, of C Bᵀ in fp32; elements of the states."""
    T, Q = shape.tokens, min(shape.Q, shape.L)
    states = shape.B * -(-shape.L // Q) * shape.d_inner * shape.N
    return 2 * T * shape.d_inner, 2 * T * shape.G * shape.N, 4 * T * shape.H, 4 * T * Q * shape.G, states


def mamba_ssm(shape: Shape) -> list[Pass]:
    """The 5 kernels forward and 9 backward of mamba_ssm 2.2, and the 4 of the forward that its backward runs
    again, at chunks of `shape.Q`: by the dtypes of the tensors that pass between them."""
    x, bc, step, CB, S = _sizes(shape)
    T, Q, inner, N = shape.tokens, min(shape.Q, shape.L), shape.d_inner, shape.N
    full, causal, state = 2 * T * Q * shape.G * N, T * Q * inner, 2 * T * inner * N
    first = {
        "chunk_cumsum_fwd": (step, 2 * step, 0),
        "bmm_chunk_fwd": (2 * bc, CB, full),
        "chunk_state_fwd": (x + bc + 2 * step, 4 * S, state),
    }
    forward = {
        **first,
        "state_passing_fwd": (4 * S, 2 * S, 0),
        "chunk_scan_fwd": (CB + x + 2 * step + bc + 2 * S, x, state + causal),
    }
    again = {**first, "state_passing_fwd": (4 * S, 4 * S, 0)}
    backward = {
        "chunk_scan_bwd_dstates": (bc + step + x, 4 * S, state),
        "state_passing_bwd": (8 * S, 4 * S, 0),
        "chunk_scan_chunk_state_bwd_dx": (2 * x + CB + 2 * step + bc + 2 * S, x + step, state + causal),
        "chunk_state_bwd_db": (x + 2 * S + bc + 2 * step, 2 * bc + step, state),
        "chunk_scan_bwd_dc": (x + 2 * S + bc + 2 * step, 2 * bc + step, state),
        "chunk_scan_bwd_dcb": (2 * x + 2 * step, CB, causal),
        "bmm_chunk_bwd, dB": (CB + 3 * bc, bc, full),
        "bmm_chunk_bwd, dC": (CB + 3 * bc, bc, full),
        "chunk_scan_bwd_ddAcs": (2 * x + 2 * step + CB, step, causal),
        "chunk_cumsum_bwd": (3 * step, step, 0),
    }
    return [
        *_passes(forward, True),
        *_passes({f"{name}, again": counted for name, counted in again.items()}, False),
        *_passes(backward, False),
    ]


def _passes(counted: Mapping[str, tuple[float, float, float]], forward: bool) -> list[Pass]:
    return [Pass(name, *numbers, forward=forward) for name, numbers in counted.items()]
