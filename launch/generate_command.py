"""`plait generate`: a model goes on from prompts."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.tokenizer import Tokenizer
    from ..pretrain.loading import LoadedModel


def generate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_HF", help="A run's folder, RUN@STEP, or a Hugging Face folder.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="To go on from; several make a batch.")
    ] = None,
    prompt_file: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A file that is a prompt; - is standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens a prompt gets at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens with this probability together.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the choices; a prompt's do not depend on the others.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"] | None,
        typer.Option(help="Of the computation; by default as in training."),
    ] = None,
) -> None:
    """Continue texts with a model; a single prompt's text appears as it comes."""
    from rich.console import Console

    from ..pretrain.generation import Sampling, collect, decode

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    if max_tokens < 1:
        raise UserError(f"--max-tokens = {max_tokens}: give 1 or more")
    texts = _prompts(prompt or (), prompt_file or ())
    loaded = _load(model, dtype)
    if (tokenizer := loaded.tokenizer) is None:
        raise UserError(f"{model}: has no tokenizer, so it reads no text; put its tokenizer.model there")
    prompts = [tokenizer.encode(text) for text in texts]
    began = time.perf_counter()
    steps = decode(
        loaded.model,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        end_of_document=tokenizer.end_of_document,
        vocab_size=min(tokenizer.vocab_size, loaded.model.config.vocab_size),
        dtype=loaded.dtype,
    )
    console = Console(highlight=False)
    if len(prompts) == 1:
        count = _stream(texts[0], prompts[0], (step[0] for step in steps), tokenizer, console)
    else:
        rows = collect(steps)
        count = sum(map(len, rows))
        for number, (text, ids, row) in enumerate(zip(texts, prompts, rows, strict=True), start=1):
            console.print(f"[bold]== {number} of {len(rows)}[/]")
            _stream(text, ids, iter(row), tokenizer, console)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s", file=sys.stderr)


def _load(reference: str, dtype: str | None) -> "LoadedModel":
    from ..pretrain.huggingface.loading import load_folder
    from ..pretrain.loading import load_run

    path = Path(reference)
    if not path.is_dir() or (path / "config.yaml").is_file():
        return load_run(reference, dtype=dtype)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: neither a run (config.yaml) nor a Hugging Face folder (config.json)")
    return load_folder(path, dtype=dtype)


def _prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    named = {f"--prompt {number}": text for number, text in enumerate(texts, start=1)}
    for file in files:
        try:
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            named[f"--prompt-file {file}"] = content.decode("utf-8")
        except OSError as error:
            raise UserError(f"--prompt-file {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt-file {file}: not UTF-8; convert it first") from None
    if not named:
        raise UserError("no prompt; give --prompt TEXT or --prompt-file FILE")
    for name, text in named.items():
        if not text:
            raise UserError(f"{name}: is empty; a model says what follows a text, not how one begins")
    return list(named.values())


def _stream(
    text: str, ids: Sequence[int], tokens: Iterator[int | None], tokenizer: "Tokenizer", console: "Console"
) -> int:
    """Print a prompt and each piece of text as its tokens come; returns how many came."""
    from ..pretrain.generation import TextStream

    stream, count = TextStream(tokenizer, ids), 0

    def show(piece: str, style: str = "") -> None:
        # What a model makes up must not steer the terminal.
        safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
        console.out(safe if console.is_terminal else piece, end="", style=style)
        console.file.flush()

    show(text, style="dim")
    for token in tokens:
        if token is None:
            break
        show(stream.push(token))
        count += 1
    show(stream.finish() + "\n")
    return count
