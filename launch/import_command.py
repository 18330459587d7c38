"""`plait import`: models that were trained elsewhere become runs."""

from typing import Annotated

import typer

app = typer.Typer(help="Make a run of a model that was trained elsewhere.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Keeps `hf` a command of its own while it is the only one."""


@app.command()
def hf(
    folder: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder, of type nemotron_h.")
    ],
    run: Annotated[str, typer.Argument(help="The run's folder to make.")],
    carry_unknown: Annotated[
        bool,
        typer.Option(
            "--carry-unknown",
            help="Keep tensors that the model has no place for, through training and into an export.",
        ),
    ] = False,
) -> None:
    """Make a run of a Hugging Face folder, bit for bit; begin trainings from it by checkpoint.init_from."""
    from rich.console import Console
    from rich.markup import escape

    from ..pretrain.huggingface import import_folder

    console = Console(highlight=False, soft_wrap=True)
    with console.status("reading, checking, writing"):
        imported = import_folder(folder, run, carry_unknown=carry_unknown)
    place = escape(run)
    console.print(f"[bold green]imported[/] {escape(folder)} to [bold]{place}[/]")
    console.print(
        f"{escape(imported.model.layers)}, {imported.parameters:,} parameters, {imported.dtype} in its files"
    )
    if imported.carried:
        console.print(f"carried through unchanged: {escape(', '.join(imported.carried))}")
    for note in imported.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    if imported.tokenizer is not None:
        console.print(f"build a corpus for it: plait data build CORPUS --corpus TEXTS --tokenizer {place}")
    console.print(f"train it on: plait train CONFIG checkpoint.init_from={place}")
