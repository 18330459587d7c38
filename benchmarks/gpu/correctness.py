"""Outputs, states and all gradients of every operator, against its specification in float64 there."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operators import Case, cases
from .setting import Results, Setting

__all__ = ["compute", "run"]

LIMITS = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""The largest difference, by the largest number of a tensor: fp32 sums of a few hundred terms, whose products
are three of tf32; bf16 and fp16 inputs rounded to 8 and 11 bits, and rounded again between two products."""


def run(setting: Setting, results: Results) -> None:
    # bf16 products are wrong in the interpreter; the kernels' own upcast makes them exact, torch's none are.
    dtypes = (torch.float32,) if setting.interpret else tuple(LIMITS)
    wrong = 0
    for case in cases(setting.device, tiny=setting.tiny):
        for dtype in dtypes:
            row: dict[str, Any] = {"operator": case.name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                errors = compare(case, dtype)
                row |= {"errors": errors, "limit": LIMITS[dtype]}
                row["right"] = all(error <= LIMITS[dtype] for error in errors.values())
            # One operator's fault must not hide the others'.
            except Exception:
                row |= {"right": False, "error": traceback.format_exc()[-2000:]}
            wrong += not row["right"]
            results.add("operators", row)
    if wrong:
        raise SystemExit(f"{wrong} of the comparisons are beyond their limits: see the operators' rows")


def compare(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Tensor -> its largest difference by the largest number in it."""
    given = {
        name: tensor.to(dtype if name in case.low else torch.float32) for name, tensor in case.inputs.items()
    }
    found = compute(case.run, given)
    expected = compute(case.naive, {name: tensor.double() for name, tensor in given.items()})
    errors = {}
    for name, exact in expected.items():
        difference = (found[name].double() - exact).abs().max()
        errors[name] = (difference / exact.abs().max().clamp_min(1e-30)).item()
    return errors


def compute(form: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the inputs for an output gradient that depends on the shapes alone."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = form(**leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device).to(out.dtype)
        for out in outputs
    ]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    names = [f"output {place}" for place in range(len(outputs))] + [f"grad {name}" for name in leaves]
    return dict(zip(names, [out.detach() for out in outputs] + list(found), strict=True))
