"""Which versions a node runs, without importing them."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import __version__

__all__ = ["versions"]

PACKAGE = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """By name; `none` for what is not there."""
    return {
        "plait": f"{__version__}+{_fingerprint()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "driver": _driver(),
        "kernel": platform.release(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _fingerprint() -> str:
    """Of the package's source: two checkouts of one version may differ."""
    whole = hashlib.sha256()
    for folder in ("data", "kernels", "launch", "parallel", "pretrain"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            whole.update(file.relative_to(PACKAGE).as_posix().encode())
            whole.update(file.read_bytes())
    return whole.hexdigest()[:8]


def _driver() -> str:
    """NVIDIA's, as its kernel module says."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return "none"
