"""A Hugging Face folder as it was found: config.json, and what its safetensors files hold.

Nothing that the folder says of itself is believed before it was held against the files that are there,
and no pickle is opened.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data.plain_file import parse_json, read_plain
from ...errors import UserError

__all__ = ["HeldTensor", "ModelFolder"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_BYTES = 256 << 20
"""Of config.json and of the index."""
PICKLES = ("*.bin", "*.pt", "*.pth")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What checkpoints of plait can hold, by safetensors' names."""


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in one of the files."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelFolder:
    """A folder of config.json and safetensors files.

    Attributes:
        config: config.json as it stands.
        tensors: all that the files hold, by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, HeldTensor]

    @classmethod
    def open(cls, path: str | Path) -> "ModelFolder":
        """Read config.json and the headers of the files.

        Raises:
            UserError: no such folder, a file that is missing, damaged or a pickle, or an index that
                does not say what the files hold.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name one that holds {CONFIG} and safetensors files")
        config = _json(path / CONFIG)
        tensors: dict[str, HeldTensor] = {}
        for file, promised in _files(path).items():
            held = _header(path / file)
            if promised is not None:
                _check_index(path / INDEX, file, promised, held.keys())
            tensors |= held
        return cls(path, config, tensors)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by its name, as long as the block lasts."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(name: str) -> Tensor:
                file = self.tensors[name].file
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, "pt"))
                    return opened[file].get_tensor(name)
                except (SafetensorError, OSError) as error:
                    raise _damaged(file, error) from None

            yield read


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = parse_json(read_plain(path, most=MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; bring the whole folder") from None
    except ValueError:
        raise UserError(f"{path}: not JSON, perhaps cut off; download it again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not an object of keys; download it again")
    return tree


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File -> the tensors that the index promises in it; None where there is no index."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        return _promises(folder / INDEX)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code and are never opened; "
            "save the model as safetensors"
        )
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise UserError(f"{folder}: holds {shards[0]} but no {SINGLE} and no {INDEX}; bring the whole folder")
    raise UserError(f"{folder}: holds no safetensors file; name a folder with {SINGLE} or {INDEX}")


def _promises(path: Path) -> dict[str, set[str] | None]:
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map of tensors and files; download it again")
    promises: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not _is_plain_name(file):
            raise UserError(
                f"{path}: places {name} in {json.dumps(file)[:80]}, which is no safetensors file of this "
                "folder; download it again"
            )
        if not (path.parent / file).is_file():
            raise UserError(f"{path.parent / file}: missing, and {INDEX} names it; bring the whole folder")
        names = promises.setdefault(file, set())
        assert names is not None
        names.add(name)
    return promises


def _is_plain_name(file: Any) -> bool:
    """Whether it names a file beside the index: nothing may lead out of the folder."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    return not set(file) & set("/\\\0") and Path(file).name == file


def _header(path: Path) -> dict[str, HeldTensor]:
    held = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{path}: {name} has the dtype {view.get_dtype()}; "
                        f"only {', '.join(DTYPES)} can be held"
                    )
                held[name] = HeldTensor(name, path, tuple(view.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    return held


def _check_index(index: Path, file: str, promised: set[str], held: Any) -> None:
    if lacking := sorted(promised - set(held)):
        raise UserError(
            f"{index}: places {lacking[0]} in {file}, which does not hold it; download both again"
        )
    if unnamed := sorted(set(held) - promised):
        raise UserError(
            f"{index}: does not place {unnamed[0]} in {file}, which holds it; download both again"
        )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{path}: not a whole safetensors file ({reason}); download it again")
