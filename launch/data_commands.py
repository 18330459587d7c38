"""`plait data`: text to tokenizer, shards and batches."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .config_commands import ConfigArgument, OverridesArgument

if TYPE_CHECKING:
    from ..data.build import Progress

app = typer.Typer(help="Turn text into a tokenizer and shards, and look at them.", no_args_is_help=True)

CorpusOption = Annotated[
    list[str],
    typer.Option(
        help="'stdlib' (the source of Python's standard library); a text, JSONL or Parquet file, a saved "
        "dataset, or a folder of them; or hub:OWNER/NAME of the Hugging Face hub. Repeat for more."
    ),
]
TextKeyOption = Annotated[str, typer.Option(help="The key or column that holds a row's text.")]
PromptKeyOption = Annotated[str, typer.Option(help="The key or column of a prompt, where rows have one.")]
CompletionKeyOption = Annotated[str, typer.Option(help="The key or column of what follows a prompt.")]
SECONDS_BETWEEN_LINES = 10.0


class MaskChoice(StrEnum):
    PROMPT = "prompt"
    NONE = "none"


@app.command()
def tokenizer(
    out: Annotated[Path, typer.Argument(metavar="OUT.model", help="The model file to write.")],
    corpus: CorpusOption,
    vocab_size: Annotated[int, typer.Option(min=258, help="Ids in all, the 256 bytes among them.")],
    text_key: TextKeyOption = "text",
    prompt_key: PromptKeyOption = "prompt",
    completion_key: CompletionKeyOption = "completion",
    sample_bytes: Annotated[
        int | None, typer.Option(min=1, help="Train on at most so many bytes of text. [default: 64 MiB]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which text is sampled.")] = 0,
) -> None:
    """Train a sentencepiece BPE tokenizer with byte fallback on a sample of a corpus."""
    from ..data.corpus import Corpus
    from ..data.documents import Keys
    from ..data.tokenizer import DEFAULT_SAMPLE_BYTES, train_tokenizer

    began = time.perf_counter()
    documents = Corpus(corpus, Keys(text_key, prompt_key, completion_key))
    trained = train_tokenizer(
        documents, out, vocab_size=vocab_size, sample_bytes=sample_bytes or DEFAULT_SAMPLE_BYTES, seed=seed
    )
    seconds = time.perf_counter() - began
    typer.echo(f"{out}: {trained.vocab_size} ids, from {', '.join(documents.description)}, {seconds:.1f} s")


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The corpus folder to write.")],
    corpus: CorpusOption,
    tokenizer: Annotated[
        Path,
        typer.Option(help="A model file of `plait data tokenizer`, or a folder with a tokenizer.json."),
    ],
    text_key: TextKeyOption = "text",
    prompt_key: PromptKeyOption = "prompt",
    completion_key: CompletionKeyOption = "completion",
    mask: Annotated[
        MaskChoice, typer.Option(help="'prompt': the tokens of prompts are read but are no targets.")
    ] = MaskChoice.NONE,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenize; the bytes are the same. [default: the cores]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the documents' order and who is held out.")] = 0,
    validation: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Documents to hold out: a share below 1, a count, or 0 for none. "
            "[default: one in a hundred, from 1 to 10000]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a corpus built with another tokenizer.")] = False,
) -> None:
    """Tokenize and shuffle a corpus into shards in Megatron's format, with a manifest beside them."""
    from ..data.build import build as build_corpus
    from ..data.corpus import Corpus
    from ..data.documents import Keys
    from ..data.tokenizer import load_tokenizer

    began = time.perf_counter()
    opened = load_tokenizer(tokenizer)
    documents = Corpus(corpus, Keys(text_key, prompt_key, completion_key, mask.value))
    with _progress() as report:
        manifest = build_corpus(
            out,
            documents.documents(),
            opened,
            seed=seed,
            validation=validation,
            mask=mask.value,
            workers=workers or _cores(),
            description=documents.description,
            force=force,
            report=report,
        )
    seconds = time.perf_counter() - began
    for name, split in manifest.splits.items():
        targets = f", {split.mask.counted_tokens} of them targets" if split.mask else ""
        typer.echo(f"{out}/{name}: {split.documents} documents, {split.tokens} tokens{targets}")
    tokens = sum(split.tokens for split in manifest.splits.values())
    megabytes = sum(split.text_bytes for split in manifest.splits.values()) / 1e6
    typer.echo(
        f"{megabytes:.1f} MB of text in {seconds:.1f} s: {megabytes / seconds:.1f} MB/s, "
        f"{tokens / seconds:.0f} tokens/s, {manifest.bytes_per_token:.2f} bytes a token"
    )


@app.command()
def inspect(
    corpus: Annotated[str, typer.Argument(metavar="OUT_OR_PREFIX", help="A corpus folder, or one's shards.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
) -> None:
    """Show what shards hold: counts, lengths of documents, and a few documents as text."""
    from . import data_inspection

    data_inspection.show(corpus, samples)


@app.command()
def verify(out: Annotated[Path, typer.Argument(metavar="OUT", help="A corpus folder.")]) -> None:
    """Read every file of a corpus again: checksums, counts, every id against the vocabulary, masks."""
    from ..data.verification import verify as verify_corpus

    manifest = verify_corpus(out)
    tokens = sum(split.tokens for split in manifest.splits.values())
    typer.echo(
        f"{out}: {', '.join(manifest.splits)} and tokenizer are what the manifest says, "
        f"to each of {tokens} tokens"
    )


@app.command()
def batch(
    config: ConfigArgument,
    step: Annotated[int, typer.Option(min=1, help="The optimizer step, counted from 1.")],
    out: Annotated[Path, typer.Option(metavar="F.npz", help="The file to write.")],
    overrides: OverridesArgument = None,
) -> None:
    """Write the batch of one optimizer step: tokens, targets, document_ids, positions, each (B, L)."""
    import numpy as np

    from ..data.plan import open_sources
    from ..data.window import batch as read_batch
    from ..pretrain.config_file import load_config
    from ..pretrain.course import plan_of_step

    plan, samples, present = plan_of_step(load_config(config, overrides or ()), step)
    shards = open_sources(plan, samples[0])
    arrays = read_batch(plan, shards, samples, isolate_documents=present.data.isolate_documents)
    try:
        with out.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another file") from None
    size, length = arrays["tokens"].shape
    typer.echo(f"{out}: samples {samples[0]} to {samples[-1]}, {size} x {length} tokens")


@contextmanager
def _progress() -> "Iterator[Callable[[Progress], None]]":
    """A bar on a terminal; a line now and then where the output goes to a file."""
    if not sys.stderr.isatty():
        yield _line_reporter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents, {task.fields[millions]:.1f} M tokens"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("", total=None, millions=0.0)
        shown = ""

        def report(progress: "Progress") -> None:
            nonlocal shown
            if progress.phase != shown:
                shown = progress.phase
                bars.reset(bar, description=shown, total=progress.total)
            bars.update(bar, completed=progress.documents, millions=progress.tokens / 1e6)

        yield report


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _line_reporter() -> "Callable[[Progress], None]":
    last = time.monotonic()

    def report(progress: "Progress") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and progress.documents != progress.total:
            return
        last = now
        of = f" of {progress.total}" if progress.total else ""
        print(
            f"{progress.phase}: {progress.documents}{of} documents, {progress.tokens} tokens", file=sys.stderr
        )

    return report
