"""What every section of a config is made of: its class, and the kinds of value that several share."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Coefficient", "Count", "Duration", "Section", "divisors"]

Count = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


MOST_PROPOSED = 1024
"""Larger divisors are left out: nobody means them, and looking for those of 2^60 would not end."""

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> Any:
    """Seconds, as a number or as in 11h50m."""
    if not isinstance(value, str) or not re.fullmatch(r"(\d+[dhms])+", value):
        return value
    return sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+)([dhms])", value))


Duration = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds)]


class Section(BaseModel):
    """A part of the config: frozen, keyword-only, strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def divisors(n: int) -> str:
    """The divisors of a number that a message proposes."""
    return ", ".join(str(d) for d in range(1, min(n, MOST_PROPOSED) + 1) if n % d == 0)
