"""What a run remembers of the folder that its weights came from, so that an export can give it back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from .names import FileTensor
from .shards import is_exact

__all__ = ["DTYPES", "Dtype", "Origin", "file_dtypes"]

Dtype = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Origin:
    """A Hugging Face folder that was imported; it travels in the facts of checkpoints."""

    folder: str
    """Its name."""
    dtype: Dtype
    """Of most of its numbers."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of its config.json that the model's own config does not hold."""
    dtypes: dict[str, Dtype] = field(default_factory=dict)
    """Tensors on disk in another dtype than an export of `dtype` gives them. This is so of the imported
    weights alone: training makes A_log and its like into numbers that need fp32."""

    def to_facts(self) -> dict[str, Any]:
        return {"huggingface": asdict(self)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Origin | None":
        """The origin in a checkpoint's facts; None where its weights began here."""
        found = facts.get("origin", {}).get("huggingface")
        return cls(**found) if found else None


def file_dtypes(
    entries: Sequence[FileTensor], dtype: Dtype, unusual: Mapping[str, Dtype]
) -> dict[str, torch.dtype]:
    """The dtype of each tensor in an export's files.

    Args:
        dtype: of all but those that stay fp32: A_log, D, dt_bias and the routers.
        unusual: the names of tensors that have another.
    """
    usual = {e.name: torch.float32 if is_exact(e.parts[0].name) else DTYPES[dtype] for e in entries}
    return usual | {name: DTYPES[kind] for name, kind in unusual.items() if name in usual}
