"""Generation against transformers' generate, on the export of the same weights, in one run.

    python benchmarks/generate.py [--model runs/demo/hf] [--batch 1 8] [--prompt 512] [--new 128]

Both are greedy, never stop early, and take turns; a turn is the prompt and all new tokens. Prompts are
Python's own sources. Prints one Markdown table, and whether both wrote the same.
"""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from timing import machine, take_turns

from plait.pretrain.generation import collect, decode
from plait.pretrain.huggingface.loading import load_folder
from plait.pretrain.loading import LoadedModel

Writer = Callable[[list[list[int]]], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/demo/hf", help="an export; `make demo` makes this one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    for name, value in (("prompt", 512), ("new", 128), ("turns", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    loaded = load_folder(args.model, dtype=args.dtype)
    forms = {"plait": ours(loaded, args.new), "transformers": theirs(args, loaded)}
    print(machine("transformers"))
    print(
        f"\n{args.model} in {args.dtype}; prompts of {args.prompt} tokens, {args.new} new ones each; "
        f"medians of {args.turns} turns\n"
    )
    print("| batch | form | seconds | new tokens/s | plait is faster by | same tokens |")
    print("|---|---|---|---|---|---|")
    for batch in args.batch:
        prompts = sources(loaded, batch, args.prompt)
        same = equal_share(*(form(prompts) for form in forms.values()))
        times = take_turns({name: partial(form, prompts) for name, form in forms.items()}, args.turns)
        for name in forms:
            seconds = times[name].median
            last = (
                f"| {times['plait'].times_faster_than(times[name]):.2f}x | {same:.1%} |"
                if name != "plait"
                else "| | |"
            )
            print(f"| {batch} | {name} | {seconds:.3f} | {batch * args.new / seconds:.0f} {last}")


def ours(loaded: LoadedModel, new: int) -> Writer:
    return lambda prompts: collect(decode(loaded.model, prompts, max_tokens=new, dtype=loaded.dtype))


def theirs(args: argparse.Namespace, loaded: LoadedModel) -> Writer:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = loaded.model.head_weight.device
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), local_files_only=True
    )
    model.to(device)

    def write(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=device)
        text = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=args.new,
            max_new_tokens=args.new,
            eos_token_id=None,
        )
        return text[:, len(prompts[0]) :].tolist()

    return write


def sources(loaded: LoadedModel, batch: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens, each from another place."""
    assert loaded.tokenizer is not None
    text = inspect.getsource(argparse)
    ids = loaded.tokenizer.encode(text * (1 + batch * length // len(text)))
    assert len(ids) >= batch * length
    return [ids[row * length : (row + 1) * length] for row in range(batch)]


def equal_share(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of places up to which rows agree: a row that parts goes its own way."""
    places = agreed = 0
    for a, b in zip(one, other, strict=True):
        equal = [x == y for x, y in zip(a, b, strict=True)]
        places += len(equal)
        agreed += equal.index(False) if False in equal else len(equal)
    return agreed / places


if __name__ == "__main__":
    main()
