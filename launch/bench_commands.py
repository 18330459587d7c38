"""`plait bench`: what kernels run here and why, what they take, and how fast they are."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .config_commands import ConfigArgument, OverridesArgument

app = typer.Typer(
    help="See which kernels run here and why, reckon and measure them, tune and compile them ahead of time.",
    no_args_is_help=True,
)

DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
OperatorsOption = Annotated[
    list[str] | None, typer.Option("--operator", help="Only these operators; may be given several times.")
]
InterpretOption = Annotated[
    bool, typer.Option("--interpret", help="On the CPU, through Triton's interpreter: a rehearsal.")
]
TinyOption = Annotated[bool, typer.Option("--tiny", help="At sizes that take moments.")]


@app.command()
def doctor() -> None:
    """Say which form each operator takes on this machine, and why."""
    from .bench_doctor import report

    for line in report():
        typer.echo(line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ssd(
    context: typer.Context,
    model: Annotated[
        bool, typer.Option(help="Reckon the kernels' bytes and times; measure nothing.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="With --model: a100, h100, h200, b200 or mi300x.")] = "h100",
    batch: int = 8,
    length: int = 4096,
    heads: int = 128,
    head_dim: int = 64,
    groups: int = 8,
    d_state: int = 128,
    chunk_size: int = 256,
) -> None:
    """The scan against its rivals; or, with --model, each of its kernels against the floor and mamba_ssm's.

    Without --model, options are those of benchmarks/ssd.py, which it runs.
    """
    if not model:
        _run_script("ssd.py", sys.argv[sys.argv.index("ssd") + 1 :])
        return
    if context.args:
        raise UserError(f"plait bench ssd --model does not know {context.args[0]}; see --help")
    from ..kernels.compiling import Shape
    from .bench_model import report

    shape = Shape("given", batch, length, heads, head_dim, groups, d_state, 0, 0, 0, Q=chunk_size)
    for line in report(shape, gpu):
        typer.echo(line)


@app.command()
def tune(
    out: Annotated[
        Path | None, typer.Option(help="The table; by default ~/.config/plait/kernels/ARCH.json.")
    ] = None,
    operator: OperatorsOption = None,
    most: Annotated[int | None, typer.Option(help="Candidates a kernel, at most.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    interpret: InterpretOption = False,
    tiny: TinyOption = False,
) -> None:
    """Try block sizes of every kernel on the GPU at hand, and write the fastest into a table of your own."""
    from .bench_tuning import run

    if interpret:
        _interpret()
    run(out, operator, most, dtype, interpreted=interpret, tiny=tiny)


@app.command()
def warm(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    arch: Annotated[
        str | None, typer.Option(help="Compile for this architecture, such as sm_90, not the GPU at hand.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="By default one a core, at most 16.")] = None,
) -> None:
    """Compile the kernels that a config needs into its cache, before a run."""
    from .bench_warming import run

    run(config, overrides or (), arch, processes or min(16, os.cpu_count() or 1))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def gpu(context: typer.Context) -> None:
    """Check and measure everything on the GPU at hand; options are those of benchmarks/gpu/run.py."""
    _run_script("gpu/run.py", context.args)


def _interpret() -> None:
    """For this process, which has not imported a kernel yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PLAIT_KERNELS"] = "triton"


def _run_script(name: str, arguments: list[str]) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / name
    if not script.exists():
        raise UserError(f"benchmarks/{name} is not in an installed package; run this from plait's repository")
    finished = subprocess.run([sys.executable, str(script), *arguments], check=False)
    if finished.returncode:
        raise typer.Exit(finished.returncode)
