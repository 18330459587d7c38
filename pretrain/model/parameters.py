"""Parameters that know how they begin: a value depends on the parameter's name and the seed alone.

A module declares each parameter with its shape and its rule; `initialize` fills them. Every row (an
index of dim 0) has a random generator of its own, seeded by (seed, name, row), so that whoever holds
only some rows, on any number of ranks, makes the same numbers.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ...parallel.placements import Split, local, part

__all__ = [
    "Constant",
    "LogUniformA",
    "LogUniformStep",
    "Normal",
    "Rule",
    "Uniform",
    "declare",
    "declared_splits",
    "initialize",
]


class Rule(Protocol):
    """How a row of a parameter begins."""

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        """Fill `row`, in fp32 or float64, in place."""
        ...


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        row.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    std: float

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        row.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    bound: float

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        row.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class LogUniformA:
    """``A_log`` of a decay rate -A uniform in [low, high]."""

    low: float = 1.0
    high: float = 16.0

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        row.uniform_(self.low, self.high, generator=generator).log_()


@dataclass(frozen=True)
class LogUniformStep:
    """``dt_bias`` of a step size log-uniform in [low, high], through the softplus's inverse."""

    low: float = 1e-3
    high: float = 1e-1
    floor: float = 1e-4

    def __call__(self, row: Tensor, generator: torch.Generator) -> None:
        row.uniform_(math.log(self.low), math.log(self.high), generator=generator)
        step = row.exp().clamp_(min=self.floor)
        row.copy_(step + torch.log(-torch.expm1(-step)))


def declare(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    rule: Rule,
    *,
    tp_dim: int | None = None,
    ep_dim: int | None = None,
) -> nn.Parameter:
    """Register an uninitialised parameter of `module`, with its rule and its placement beside it.

    Args:
        shape: of the whole parameter, over all ranks.
        tp_dim: the dim that tensor parallelism cuts; None where each rank holds the whole.
        ep_dim: the dim that expert parallelism cuts, of an expert's parameter; tensor parallelism does
            not know it.
    """
    parameter = nn.Parameter(torch.empty(shape))
    module.register_parameter(name, parameter)
    rules: dict[str, Rule] = module.__dict__.setdefault("initial_rules", {})
    rules[name] = rule
    splits: dict[str, Split] = module.__dict__.setdefault("splits", {})
    splits[name] = Split("tp", tp_dim) if ep_dim is None else Split("ep", ep_dim)
    return parameter


def declared_splits(model: nn.Module) -> dict[str, Split]:
    """How every declared parameter of `model` is cut, by its name."""
    return {
        f"{path}.{name}" if path else name: split
        for path, module in model.named_modules()
        for name, split in module.__dict__.get("splits", {}).items()
    }


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every declared parameter of `model` from `seed`, or this rank's part of it.

    Numbers are drawn in fp32 on the CPU, a row at a time, whatever the parameter's dtype, device and
    layout, so that they are the same everywhere and no rank holds what is not its own.
    """
    generator = torch.Generator()
    for path, module in model.named_modules():
        rules: dict[str, Rule] = module.__dict__.get("initial_rules", {})
        for name, rule in rules.items():
            parameter = module.get_parameter(name)
            mine = local(parameter)
            if isinstance(rule, Constant):
                mine.fill_(rule.value)
                continue
            full_name = f"{path}.{name}" if path else name
            held, *columns = part(parameter)
            row = torch.empty(parameter.shape[1:], dtype=torch.float32)
            values = torch.empty(mine.shape, dtype=torch.float32)
            for place, index in enumerate(range(held.start, held.stop)):
                key = hashlib.blake2b(f"{seed}/{full_name}/{index}".encode(), digest_size=8).digest()
                generator.manual_seed(int.from_bytes(key, "little"))
                rule(row, generator)
                values[place] = row[tuple(columns)]
            mine.copy_(values)
