"""Where the time of plait's training step goes on a CPU, by operator: in matrix products, and beside them.

    python benchmarks/step_profile.py [--dtype float32 bfloat16] [--turns 5]

The model is that of train_step.py. Each event of torch's profiler counts for the operator that called it,
forward and backward together. The profiler lengthens short calls, so what is beside the products comes out a
little too long.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator

import torch
from table_rows import heading, line
from timing import machine
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from train_step import ATTENTION, PRODUCTS, make, parser, size

# The first that is in the name of an operator which is running, from the outermost inwards.
FAMILIES = {
    "linear_cross_entropy": "cross-entropy and head",
    "plait::ssd": "scan",
    "causal_convolution": "convolution",
    "rms_norm": "norms",
    "squared_relu": "activations",
    "grouped_linear": "experts",
    "experts": "experts",
    ATTENTION: "attention",
    "adamw": "optimizer",
}


def family(event: FunctionEvent) -> str:
    """For which operator it works."""
    names = []
    at = event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    for name in reversed(names):
        for part, its_family in FAMILIES.items():
            if part in name:
                return its_family
    return "linear layers" if event.name in PRODUCTS else "the rest"


def rows(name: str, args: argparse.Namespace) -> Iterator[list[str]]:
    """A dtype's lines: a family's share of the step, of that products, milliseconds."""
    step = make("plait", args, getattr(torch, name))
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(args.turns):
            step()
    products: dict[str, float] = defaultdict(float)
    beside: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        kind = products if event.name in PRODUCTS else beside
        kind[family(event)] += event.self_cpu_time_total / args.turns / 1e3
    total = sum(products.values()) + sum(beside.values())
    families = sorted({*products, *beside}, key=lambda one: -products[one] - beside[one])
    for one in families:
        both = products[one] + beside[one]
        yield [name, one, f"{both / total:.1%}", f"{both:.1f}", f"{products[one]:.1f}", f"{beside[one]:.1f}"]
    sums = sum(products.values()), sum(beside.values())
    yield [name, "all", "100%", f"{total:.1f}", *(f"{one:.1f}" for one in sums)]


def main() -> None:
    args = parser(__doc__, turns=5).parse_args()
    print(machine())
    print(f"\n{size(args)}; means of {args.turns} steps\n")
    print(*heading("dtype", "", "of the step", "ms", "matrix products", "beside them"), sep="\n")
    for name in args.dtype:
        for row in rows(name, args):
            print(line(*row))


if __name__ == "__main__":
    main()
