"""The scan alone, forward and backward: plait, transformers' fallback, and the paper's minimal form.

    python benchmarks/ssd.py [--dtype float32 bfloat16] [--length 2048] [--turns 10]

Each rival runs at the chunk length that is best for it. All compute the same numbers (checked first).
"""

import argparse
import inspect
from collections.abc import Callable, Iterator

import torch
from minimal_ssd import minimal
from table_rows import heading, line
from timing import machine, take_turns
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from plait.kernels.ssd import ssd

CHUNKS = (32, 64, 128, 256)


def fallback(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, Q: int) -> Tensor:
    scan = inspect.unwrap(mamba2_chunk_scan)
    return scan(x, dt, A, B, C, chunk_size=Q, dt_softplus=True)


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, Q: int) -> Tensor:
    return ssd(x, dt, A, B, C, chunk_size=Q)[0]


FORMS: dict[str, Callable[..., Tensor]] = {"plait": ours, "transformers": fallback, "minimal": minimal}


def inputs(dtype: torch.dtype, args: argparse.Namespace) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (args.batch, args.length)
    x = torch.randn(*shape, args.heads, args.head_dim).to(dtype)
    dt = torch.randn(*shape, args.heads) - 3
    A = -torch.exp(torch.rand(args.heads) * 2)
    B, C = ((torch.randn(*shape, args.groups, args.d_state) / 4).to(dtype) for _ in range(2))
    return [t.to(args.device).requires_grad_() for t in (x, dt, A, B, C)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (("batch", 2), ("length", 2048), ("heads", 16), ("head_dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("groups", 1), ("d_state", 64), ("turns", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    print(machine("transformers"))
    print(
        f"\nB {args.batch}, L {args.length}, H {args.heads}, P {args.head_dim}, G {args.groups}, "
        f"N {args.d_state}; forward and backward, medians of {args.turns} turns\n"
    )
    columns = "forward ms", "forward + backward ms", "plait is faster by"
    print(*heading("dtype", "form", "chunk", *columns), sep="\n")
    for name in args.dtype:
        for row in rows(name, args):
            print(line(*row))


def rows(name: str, args: argparse.Namespace) -> Iterator[list[str]]:
    """A dtype's lines of the table."""
    dtype = getattr(torch, name)
    tensors = inputs(dtype, args)
    grad = torch.randn_like(tensors[0])
    _check(tensors, dtype)

    def step(form: str, Q: int) -> Callable[[], None]:
        return lambda: _step(FORMS[form], tensors, grad, Q)

    # All chunk lengths are measured over all turns: which one is best, a few turns would not tell.
    times = take_turns({f"{form} {Q}": step(form, Q) for form in FORMS for Q in CHUNKS}, args.turns)
    best = {form: min(CHUNKS, key=lambda Q, form=form: times[f"{form} {Q}"].median) for form in FORMS}
    both = {form: times[f"{form} {Q}"] for form, Q in best.items()}
    with torch.no_grad():
        forward = take_turns(
            {form: lambda form=form: FORMS[form](*tensors, best[form]) for form in FORMS}, args.turns
        )
    for form in FORMS:
        ratio = "" if form == "plait" else f"{both['plait'].times_faster_than(both[form]):.2f}x"
        milliseconds = [f"{of[form].median * 1e3:.1f}" for of in (forward, both)]
        yield [name, form, str(best[form]), *milliseconds, ratio]


def _step(form: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, Q: int) -> None:
    y = form(*tensors, Q)
    torch.autograd.grad(y, tensors, grad.to(y.dtype))


def _check(tensors: list[Tensor], dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = FORMS["transformers"](*[t.float() for t in tensors], 64)
        for name, form in FORMS.items():
            error = (form(*tensors, 64).float() - expected).abs().max() / expected.abs().max()
            limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
            assert error < limit, f"{name} differs by {error:.1e}"


if __name__ == "__main__":
    main()
