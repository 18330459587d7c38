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

__all__ = [
    "Constant",
    "LogUniformA",
    "LogUniformStep",
    "Normal",
    "Rule",
    "Uniform",
    "declare",
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


def declare(module: nn.Module, name: str, shape: tuple[int, ...], rule: Rule) -> nn.Parameter:
    """Register an uninitialised parameter of `module`, with its rule beside it."""
    parameter = nn.Parameter(torch.empty(shape))
    module.register_parameter(name, parameter)
    rules: dict[str, Rule] = module.__dict__.setdefault("initial_rules", {})
    rules[name] = rule
    return parameter


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every declared parameter of `model` from `seed`.

    Numbers are drawn in fp32 on the CPU, whatever the parameter's dtype and device, so that they are
    the same everywhere.
    """
    generator = torch.Generator()
    for path, module in model.named_modules():
        rules: dict[str, Rule] = module.__dict__.get("initial_rules", {})
        for name, rule in rules.items():
            parameter = module.get_parameter(name)
            full_name = f"{path}.{name}" if path else name
            if isinstance(rule, Constant):
                parameter.fill_(rule.value)
                continue
            values = torch.empty(parameter.shape, dtype=torch.float32)
            for index, row in enumerate(values.unbind(0)):
                key = hashlib.blake2b(f"{seed}/{full_name}/{index}".encode(), digest_size=8).digest()
                generator.manual_seed(int.from_bytes(key, "little"))
                rule(row, generator)
            parameter.copy_(values)
