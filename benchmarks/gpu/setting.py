"""Where sections run, and the results that each writes down as it gets them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Results", "Setting"]


@dataclass(frozen=True)
class Setting:
    out: Path
    """The folder of the device's results."""
    tiny: bool = False
    interpret: bool = False

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device("cpu" if self.interpret else "cuda")


@dataclass
class Results:
    """What a section found so far; whatever ends it, the file has all that came before."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def write(self, key: str, value: Any) -> None:
        self.values[key] = value
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.values, indent=1, default=str))
        os.replace(beside, self.path)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row to a list."""
        self.write(key, [*self.values.get(key, []), row])
