"""`plait evaluate`: a run's loss on held-out shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder, or RUN@STEP for another checkpoint.")],
    shards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX", help="Shards to read; several may be given. By default the run's own."
        ),
    ] = None,
    batches: Annotated[
        int | None, typer.Option(help="Batches of train.batch_size windows; by default as in training.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Where to write; by default evaluation/step-… in the run's folder.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"] | None,
        typer.Option(help="Of the computation; by default as in training."),
    ] = None,
) -> None:
    """Measure loss, perplexity and bits a byte, and draw the loss by place in the window."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..pretrain.evaluation import Measured, total
    from ..pretrain.evaluation_report import evaluate_run, write_report
    from ..pretrain.loading import load_run

    console = Console(highlight=False)
    loaded = load_run(run, dtype=dtype)
    with console.status("evaluating"):
        parts = evaluate_run(loaded, shards or (), batches=batches)
    folder = Path(out) if out else loaded.folder.path / "evaluation" / f"step-{loaded.step:08d}"
    write_report(loaded, parts, folder)
    console.print(
        f"[bold]{escape(loaded.name)}[/], windows of {len(parts[0].targets_L)} tokens", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("shards", overflow="fold")
    for heading in ("targets", "loss", "perplexity", "bits a byte"):
        table.add_column(heading, justify="right")

    def add(part: Measured) -> None:
        bits = "unknown" if part.bits_per_byte is None else f"{part.bits_per_byte:.4f}"
        row = (f"{part.targets}", f"{part.loss:.4f}", f"{part.perplexity:.2f}", bits)
        table.add_row(escape(part.prefix), *row)

    for part in parts:
        add(part)
    if len(parts) > 1:
        add(total(parts))
    console.print(table)
    if parts[0].bits_per_byte is None:
        console.print("bits a byte: neither a manifest beside the shards nor a tokenizer in the run says")
    console.print(f"written to {escape(str(folder))}: evaluation.json, loss_by_position.png", soft_wrap=True)
