"""`plait bench warm`: a config's kernels compiled into its cache."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import typer

from ..errors import UserError
from ..kernels import tables
from ..kernels.ahead import compile_all
from ..kernels.compile_cache import keep_in, look_at
from ..kernels.forms import interpreted, triton_version
from ..kernels.launches import launches
from ..pretrain.config_file import load_config
from ..pretrain.kernel_shapes import operators_of, shape_of

__all__ = ["run"]


def run(config: str, overrides: Sequence[str], arch: str | None, processes: int) -> None:
    """Compile what every stage of the config launches on a rank.

    Raises:
        UserError: no triton, no GPU and no `arch`, or a cache that cannot be written.
    """
    settings = load_config(config, overrides)
    if triton_version() is None:
        raise UserError("triton cannot be imported here; install it, or leave PLAIT_KERNELS at torch")
    if interpreted():
        raise UserError("TRITON_INTERPRET=1 compiles nothing; unset it")
    if settings.train.dtype == "float64":
        raise UserError("train.dtype = float64 runs without Triton's kernels: there is nothing to warm up")
    processors = None
    if arch is None:
        if not torch.cuda.is_available():
            raise UserError("torch sees no GPU here; name the one to compile for, such as --arch sm_90")
        arch = tables.arch_of(torch.device("cuda", torch.cuda.current_device()))
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    elif arch not in tables.ARCHITECTURES:
        raise UserError(f"--arch {arch}: expected one of {', '.join(tables.ARCHITECTURES)}")
    cache = look_at(keep_in(settings.train.kernel_cache))
    if not cache.writable:
        raise UserError(f"train.kernel_cache = {cache.path} cannot be written; name a folder of your own")
    dtype = getattr(torch, settings.train.dtype)
    found = {}
    for stage in settings.each_stage():
        shape = shape_of(stage, config)
        for operator in operators_of(stage):
            moe = stage.model.moe
            width = moe.latent_dim if operator == "experts" and moe and moe.latent_dim else shape.D
            for launch in launches(replace(shape, D=width), arch, (operator,), dtype, processors):
                found.setdefault(launch.binary, launch)
    todo = [(launch, arch) for launch in found.values()]
    begin, failed = time.perf_counter(), 0
    for compiled in compile_all(todo, processes, niceness=0):
        if compiled.error:
            failed += 1
            typer.echo(f"{todo[compiled.place][0].name}: {compiled.error}")
    seconds = time.perf_counter() - begin
    typer.echo(f"{len(todo) - failed} kernels for {arch} in {cache.path}, {seconds:.1f} s")
    if failed:
        raise typer.Exit(1)
