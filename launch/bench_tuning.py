"""`plait bench tune`: the tuner on the device at hand, and its table."""

from pathlib import Path

import torch
import typer

from ..errors import UserError
from ..kernels import tables
from ..kernels.compiling import SHAPES, Shape
from ..kernels.launches import OPERATORS
from ..kernels.tuning import Tuned, tune, write_table

__all__ = ["run"]

TINY = Shape("tiny", 1, 48, 2, 16, 1, 16, 32, 64, 32, Q=32, E=16, K=2)


def run(
    out: Path | None,
    operators: list[str] | None,
    most: int | None,
    dtype: str,
    *,
    interpreted: bool,
    tiny: bool,
) -> None:
    """Tune, print a line a kernel, and write the table.

    Raises:
        UserError: nothing to tune on, or nowhere to write what the interpreter found.
    """
    for name in operators or ():
        if name not in OPERATORS:
            raise UserError(f"--operator {name}: expected one of {', '.join(OPERATORS)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {dtype}: expected bfloat16, float16 or float32")
    if interpreted:
        if out is None:
            raise UserError(
                "--interpret measures nothing that a GPU should use: give its table a place by --out"
            )
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        raise UserError("torch sees no GPU here to tune on; --interpret --tiny rehearses without one")
    arch = tables.arch_of(device)
    path = out or tables.own_table_path(arch)
    found: list[Tuned] = []
    shapes = [TINY] if tiny else SHAPES
    for one in tune(shapes, device, arch, operators or tuple(OPERATORS), getattr(torch, dtype), most):
        found.append(one)
        sizes = ", ".join(f"{name} {value}" for name, value in one.entry.items())
        typer.echo(
            f"{one.kernel}: {one.before:.3f} ms, now {one.after:.3f} by {sizes}; {one.tried} tried, "
            f"{one.failed} of them did not fit"
        )
        # What is found so far is kept, should the rest be interrupted.
        write_table(path, arch, found)
    typer.echo(f"{path}: {len(found)} entries; remove it to go back to plait's own")
