"""What `plait bench ssd --model` prints: bytes, FLOPs and times of the scan's kernels, as launched."""

from collections.abc import Iterator, Sequence

from ..errors import UserError
from ..kernels.compiling import Shape, compile_for
from ..kernels.devices import GPU, GPUS, OF_BANDWIDTH, OF_PRODUCTS
from ..kernels.launches import launches
from ..kernels.ssd.traffic import Pass, floor, mamba_ssm, ours

__all__ = ["report"]

HEADING = ("pass", "GB read", "GB written", "GFLOP", "GB loaded", "modelled ms")


def report(shape: Shape, name: str) -> Iterator[str]:
    """Markdown: the floor, plait's kernels, mamba_ssm's, and their sums.

    Raises:
        UserError: no such GPU, a shape that the scan does not take, or no triton.
    """
    if name not in GPUS:
        raise UserError(f"--gpu {name}: expected one of {', '.join(GPUS)}")
    if shape.H % shape.G:
        raise UserError(f"--heads {shape.H} is no multiple of --groups {shape.G}; change one")
    gpu = GPUS[name]
    found = launches(shape, gpu.arch, ("ssd",), documents=False)
    passes = ours([(launch, compile_for(launch, gpu.arch)) for launch in found], shape)
    rivals = mamba_ssm(shape)
    yield (
        f"{gpu.name}: {gpu.terabytes} TB/s and {gpu.teraflops} bf16 TFLOP/s by its data sheet, of which good "
        f"kernels are taken to get {OF_BANDWIDTH:.0%} and {OF_PRODUCTS:.0%}; nothing here is measured"
    )
    yield (
        f"B {shape.B}, L {shape.L}, H {shape.H}, P {shape.P}, G {shape.G}, N {shape.N}, Q {shape.Q}; bf16, "
        "no documents"
    )
    for way, forward in (("forward", True), ("backward", False)):
        lowest = next(one for one in floor(shape) if one.forward == forward)
        yield from ("", f"## {way}", "", f"| {' | '.join(HEADING)} |", "|---" * len(HEADING) + "|")
        yield _row(lowest, gpu)
        for title, kernels in (("plait", passes), ("mamba_ssm", rivals)):
            of_way = [one for one in kernels if one.forward == forward]
            for one in of_way:
                yield _row(one, gpu, f"{title}: ")
            yield _sum(title, of_way, lowest, gpu)


def _row(one: Pass, gpu: GPU, title: str = "") -> str:
    loaded = "" if one.through_cache is None else f"{one.through_cache / 1e9:.2f}"
    cells = [
        f"{title}{one.name}",
        f"{one.bytes_read / 1e9:.3f}",
        f"{one.bytes_written / 1e9:.3f}",
        f"{one.flops / 1e9:.0f}",
        loaded,
        f"{one.seconds(gpu) * 1e3:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _sum(title: str, passes: Sequence[Pass], lowest: Pass, gpu: GPU) -> str:
    read, written, flops = (
        sum(getattr(one, name) for one in passes) for name in ("bytes_read", "bytes_written", "flops")
    )
    seconds = sum(one.seconds(gpu) for one in passes)
    times = seconds / lowest.seconds(gpu)
    return (
        f"| **{title}, {len(passes)} launches** | {read / 1e9:.3f} | {written / 1e9:.3f} | {flops / 1e9:.0f} "
        f"| | **{seconds * 1e3:.3f}**, {times:.2f} of the floor |"
    )
