"""What every section of a config is made of: its class, and the kinds of value that several share."""

import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "Blend",
    "Coefficient",
    "Count",
    "Duration",
    "Rate",
    "Schedule",
    "Section",
    "SequenceLength",
    "Tokens",
    "divisors",
]

Count = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SequenceLength = Annotated[int, Field(ge=2)]
Schedule = Literal["wsd", "cosine", "constant"]


MOST_PROPOSED = 1024
"""Larger divisors are left out: nobody means them, and looking for those of 2^60 would not end."""

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SCALES = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _seconds(value: Any) -> Any:
    """Seconds, as a number or as in 11h50m."""
    if not isinstance(value, str) or not re.fullmatch(r"(\d+[dhms])+", value):
        return value
    return sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([dhms])", value))


Duration = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds)]


def _tokens(value: Any) -> Any:
    """A number of tokens, as 4_000_000_000, 4e9 or 4B."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?[kMBT]", value):
        return round(Fraction(value[:-1]) * SCALES[value[-1]])
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[int, Field(ge=1), BeforeValidator(_tokens)]


def _one_source(blend: Any) -> Any:
    return {blend: 1.0} if isinstance(blend, str) else blend


def _some_source(blend: dict[str, float]) -> dict[str, float]:
    if not blend:
        raise ValueError("data.blend = {} names no shards; add PREFIX: weight")
    return blend


Blend = Annotated[dict[str, Rate], BeforeValidator(_one_source), AfterValidator(_some_source)]


class Section(BaseModel):
    """A part of the config: frozen, keyword-only, strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def divisors(n: int) -> str:
    """The divisors of a number that a message proposes."""
    return ", ".join(str(d) for d in range(1, min(n, MOST_PROPOSED) + 1) if n % d == 0)
