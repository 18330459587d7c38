"""Megatron's module of indexed datasets, without the rest of its package."""

import importlib
import sys
import warnings
from functools import cache
from threading import Lock
from types import ModuleType

__all__ = ["indexed_dataset"]

PACKAGE = "megatron.core"
FIRST = "megatron.core.parallel_state"
"""It and `megatron.core.utils` import each other, and only this one may come first."""
WANTED = "megatron.core.datasets.indexed_dataset"

_lock = Lock()


def indexed_dataset() -> ModuleType:
    """The module `megatron.core.datasets.indexed_dataset`, in 0.1 s.

    The package imports its layers, optimizers and fused kernels before any of its modules, 3 s of a rank's
    start. Here an empty package takes its place meanwhile; whoever imports megatron.core later gets the whole
    one, with a module of datasets of its own.
    """
    with _lock, warnings.catch_warnings():
        # On import it warns of GPU libraries that reading files has no use for.
        warnings.simplefilter("ignore")
        return _load()


@cache
def _load() -> ModuleType:
    if PACKAGE in sys.modules:
        return importlib.import_module(WANTED)
    namespace = importlib.import_module("megatron")
    empty = ModuleType(PACKAGE)
    empty.__path__ = [f"{folder}/core" for folder in namespace.__path__]
    sys.modules[PACKAGE] = empty
    try:
        importlib.import_module(FIRST)
        return importlib.import_module(WANTED)
    except ImportError:
        # Another version, whose modules need more of each other.
        _forget()
        return importlib.import_module(WANTED)
    finally:
        if sys.modules.get(PACKAGE) is empty:
            _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    # The namespace names its parts too.
    vars(sys.modules["megatron"]).pop("core", None)
