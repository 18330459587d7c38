"""`plait export`: a run's model for the rest of the world."""

from typing import Annotated, Literal

import typer


def export(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    out: Annotated[str, typer.Argument(help="The folder to write; an earlier export there is replaced.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; the newest by default.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the files; what must stay exact is float32 in all. By default that of the folder that "
            "was imported, else float32."
        ),
    ] = None,
) -> None:
    """Write a run's model as a Hugging Face folder, read back by transformers before it appears."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..pretrain.huggingface import export_run

    console = Console(highlight=False)
    with console.status("loading, writing, and reading back with transformers"):
        exported = export_run(run, out, step=step, dtype=dtype)
    place = escape(out)
    console.print(f"[bold green]exported[/] step {exported.step} of {escape(run)} to [bold]{place}[/]")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size in exported.files.items():
        table.add_row(name, _readable(size))
    console.print(table)
    console.print(
        f"transformers agrees: logits to {exported.logit_error:.1e} of the largest, "
        f"on {exported.compared}; every tensor read"
    )
    for note in exported.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{place}")', soft_wrap=True)


def _readable(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
