"""Compiling a Triton kernel for an architecture that is not there, and reading what it takes of one.

A kernel's folder says in a `Compilation` what its launch at a `Shape` is: argument types, block sizes, the
grid, and the bytes and FLOPs that the model of its speed counts. `compile_for` makes the binary ahead of
time, on any machine that has triton, and `Usage` holds what the compiler gave it.

Shapes: B batch, L length, H heads, P head dim, G groups, N state size, D model width, V vocabulary,
E experts, K experts a token, F an MLP's or expert's hidden width.
"""

import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .tables import nearest

__all__ = [
    "LIMITS",
    "SHAPES",
    "TARGETS",
    "Compilation",
    "Limits",
    "Shape",
    "Usage",
    "compile_for",
    "occupancy",
    "source_of",
    "target_of",
]


@dataclass(frozen=True)
class Shape:
    """What one rank holds of a model: heads, groups and widths are already divided over tp."""

    model: str
    B: int
    L: int
    H: int
    P: int
    G: int
    N: int
    D: int
    V: int
    F: int
    """Hidden width of an MLP or, where there are experts, of one expert."""
    d_conv: int = 4
    Q: int = 256
    """Tokens a chunk."""
    E: int = 0
    K: int = 0
    attention: tuple[int, int, int] = (0, 0, 0)
    """Query heads, key and value heads, head dim."""
    tp: int = 1

    @property
    def label(self) -> str:
        return f"{self.model}, {self.B} x {self.L}, tp {self.tp}"

    @property
    def tokens(self) -> int:
        return self.B * self.L

    @property
    def d_inner(self) -> int:
        return self.H * self.P

    def on(self, tp: int) -> "Shape":
        """The same on each of tp ranks; groups and key heads are never fewer than one."""
        query, key, dim = self.attention
        return replace(
            self,
            H=self.H // tp,
            G=max(1, self.G // tp),
            V=self.V // tp,
            F=self.F if self.E else self.F // tp,
            attention=(query // tp, max(1, key // tp), dim),
            tp=tp,
        )


# Nemotron-H-8B: arXiv 2504.03624, table 1. Nemotron Nano 30B-A3B: NVIDIA's config.json of the released
# model (hidden_size 2688, mamba_num_heads 64, ssm_state_size 128, n_groups 8, moe_intermediate_size 1856,
# 128 experts, 6 a token). Hunyuan-TurboS: arXiv 2505.15431 gives D 5120, 16 groups, 32 experts and 2 of them
# a token; heads of 64, an inner width of 2 D and N 128 are Mamba-2's defaults (arXiv 2405.21060), F follows
# from the 56 B active parameters.
_MODELS = (
    Shape("Nemotron-H 8B", 0, 0, 128, 64, 8, 128, 4096, 131072, 21504, attention=(32, 8, 128)),
    Shape("Nano 30B-A3B", 0, 0, 64, 64, 8, 128, 2688, 131072, 1856, E=128, K=6, attention=(32, 2, 128)),
    Shape("TurboS", 0, 0, 160, 64, 16, 128, 5120, 128512, 17920, E=32, K=2, attention=(64, 8, 128)),
)
SHAPES = tuple(
    replace(model, B=B, L=L).on(tp) for model in _MODELS for B, L in ((8, 4096), (1, 262144)) for tp in (1, 8)
)
"""The production shapes: each model on short and long sequences, whole and as one of 8 ranks of tp."""


@dataclass(frozen=True)
class Compilation:
    """One launch of one kernel."""

    name: str
    """operator.kernel, such as "ssd.chunk_output"."""
    kernel: Any
    """The function under `triton.jit`."""
    signature: Mapping[str, str]
    """Every argument in order: "*bf16", "*fp32", "i64", "i32", "fp32", "constexpr", …"""
    constants: Mapping[str, Any]
    """The values of those that are constexpr; None for a tensor that is not there."""
    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 3
    attributes: Mapping[tuple[int, ...], Any] = field(default_factory=dict)
    """Place of an argument -> what the compiler may count on, such as that 16 divides it."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each tensor."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the compiler, such as `maxnreg`."""

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def binary(self) -> tuple[Any, ...]:
        """Equal for launches that one binary serves."""
        parts = self.signature, self.constants, self.options
        texts = tuple(repr(sorted(part.items())) for part in parts)
        return self.name, texts, self.num_warps, self.num_stages, repr(sorted(self.attributes.items()))

    @property
    def aligned(self) -> frozenset[str]:
        """Arguments that 16 divides, addresses and numbers."""
        names = tuple(self.signature)
        return frozenset(
            names[path[0]] for path, known in self.attributes.items() if ("tt.divisibility", 16) in known
        )

    def bytes_read(self, usage: "Usage") -> int:
        """Of the device's memory, if what programs share stays in the L2 cache: each tensor once."""
        return sum(self.sizes[name] for name in usage.reads)

    def bytes_written(self, usage: "Usage") -> int:
        return sum(self.sizes[name] for name in usage.writes)


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has (CUDA C++ Programming Guide, compute capabilities; AMD CDNA3 ISA, 3.6)."""

    backend: str
    registers: int
    """32-bit, of a multiprocessor; on AMD of one lane of one SIMD."""
    granularity: int
    """In which registers are given out: to a warp on NVIDIA, to a lane on AMD."""
    warps: int
    blocks: int
    shared: int
    """Bytes."""
    reserved: int
    """Bytes of shared memory that the system takes of each block."""
    warp_size: int = 32


_BIG = Limits("cuda", 65536, 256, 64, 32, 228 << 10, 1024)
LIMITS = {
    "sm_80": replace(_BIG, shared=164 << 10),
    "sm_86": replace(_BIG, warps=48, blocks=16, shared=100 << 10),
    "sm_89": replace(_BIG, warps=48, blocks=24, shared=100 << 10),
    "sm_90": _BIG,
    "sm_100": _BIG,
    "sm_120": replace(_BIG, warps=48, blocks=24, shared=100 << 10),
    "gfx942": Limits("hip", 512, 8, 32, 32, 64 << 10, 0, 64),
}
TARGETS = tuple(LIMITS)
"""The architectures that every kernel is compiled for."""
TENSOR_MEMORY = 512
"""Columns a multiprocessor of sm_100 has."""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    """A thread's; on AMD vector and accumulation registers together."""
    stack: int
    """Bytes a thread has in memory: spilled registers and nothing else, since Triton has no local arrays."""
    shared: int
    """Bytes a block."""
    occupancy: float
    """Part of a multiprocessor's warps that can be resident at once."""
    atomics: tuple[str, ...]
    """The atomic instructions of the assembly."""
    narrow: tuple[str, ...]
    """Arguments that are addressed with a 32-bit offset from their beginning."""
    reads: tuple[str, ...]
    """Tensors that it loads from."""
    writes: tuple[str, ...]
    tensor_memory: int = 0
    """Columns of tensor memory (sm_100)."""

    @property
    def fits(self) -> bool:
        """Whether it can be launched at all."""
        return self.occupancy > 0


def source_of(compilation: Compilation) -> Any:
    """What triton compiles, and keeps a binary by: that of a launch, and of a later one."""
    from triton.compiler import ASTSource

    attributes = {path: [list(one) for one in known] for path, known in compilation.attributes.items()}
    return ASTSource(compilation.kernel, dict(compilation.signature), dict(compilation.constants), attributes)


def target_of(arch: str) -> Any:
    """As triton names an architecture."""
    from triton.backends.compiler import GPUTarget

    limits = LIMITS[nearest(arch)]
    return GPUTarget(limits.backend, arch if limits.backend == "hip" else int(arch[3:]), limits.warp_size)


def compile_for(compilation: Compilation, arch: str) -> Usage:
    """Compile ahead of time for an architecture; triton keeps the binary in its cache."""
    import triton

    limits, target = LIMITS[nearest(arch)], target_of(arch)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    binary: Any = triton.compile(
        source_of(compilation), target=target, options=options | dict(compilation.options)
    )
    read = _read_amdgcn if limits.backend == "hip" else _read_cubin
    registers, stack, assembly = read(binary.asm)
    shared = binary.metadata.shared
    columns = getattr(binary.metadata, "tmem_size", None) or 0
    return Usage(
        registers,
        stack,
        shared,
        occupancy(limits, registers, shared, compilation.num_warps, columns),
        tuple(sorted(set(_ATOMIC[limits.backend].findall(assembly)))),
        *_addresses(binary.asm["ttir"]),
        columns,
    )


def occupancy(limits: Limits, registers: int, shared: int, num_warps: int, columns: int = 0) -> float:
    """The part of a multiprocessor's warps that blocks of this kind can fill; 0 if not one fits."""
    if limits.backend == "hip":
        # Waves are dealt out to four SIMDs, each with 512 registers a lane and room for eight waves.
        a_wave = max(limits.granularity, -(-registers // limits.granularity) * limits.granularity)
        warps = 4 * min(limits.warps // 4, limits.registers // a_wave)
    else:
        a_warp = -(-registers * limits.warp_size // limits.granularity) * limits.granularity
        warps = min(limits.warps, limits.registers // max(a_warp, 1))
    by_shared = limits.shared // (shared + limits.reserved) if shared + limits.reserved else limits.blocks
    by_columns = TENSOR_MEMORY // columns if columns else limits.blocks
    return min(limits.blocks, warps // num_warps, by_shared, by_columns) * num_warps / limits.warps


_ATOMIC = {
    "cuda": re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:atom|red)\.(?!async)[\w.:]+)", re.MULTILINE),
    "hip": re.compile(r"^\s*((?:global|flat|buffer|ds)_(?:atomic|add|cmpst)_?\w*)", re.MULTILINE),
}


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, str]:
    import tempfile

    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), asm["ptx"]


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, str]:
    text = asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s*(\d+)", text))
    # On CDNA3 vgpr_count is of the unified file: it has the accumulation registers in it.
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"]), text


def _addresses(ttir: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of the arguments, by the IR before any lowering: which get 32-bit offsets, are read, are written."""
    origin = {name: name for name in re.findall(r"%(\w+): !tt\.ptr", ttir)}
    moved: set[str] = set()
    narrow, reads, writes = set(), set(), set()
    for line in ttir.splitlines():
        if carried := re.search(r"iter_args\((.*?)\)", line):
            for inside, outside in re.findall(r"%(\w+) = %(\w+)", carried[1]):
                if outside in origin:
                    origin[inside] = origin[outside]
                    moved.add(inside)
        if not (found := re.search(r"(?:%(\w+) = )?tt\.(\w+) [^%]*%(\w+)(.*)", line)):
            continue
        result, operation, operand, rest = found.groups()
        if operand not in origin:
            continue
        root = origin[operand]
        if operation in ("splat", "broadcast", "expand_dims", "addptr", "reshape"):
            origin[result] = root
            if operation == "addptr" or operand in moved:
                moved.add(result)
        # Within a tile 32 bits are enough, once its beginning was found with 64.
        if operation == "addptr" and operand not in moved and re.search(r"i32>?(?: loc.*)?$", rest.strip()):
            narrow.add(root)
        if operation in ("load", "atomic_rmw", "atomic_cas"):
            reads.add(root)
        if operation in ("store", "atomic_rmw", "atomic_cas"):
            writes.add(root)
    return tuple(sorted(narrow)), tuple(sorted(reads)), tuple(sorted(writes))
