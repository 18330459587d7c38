"""plait from its checkout, and a kit's wheels unpacked, for a Python that has neither installed."""

import importlib.util
import platform
import sys
import tarfile
import zipfile
from pathlib import Path

__all__ = ["KIT", "ROOT", "find", "fits", "unpack"]

ROOT = Path(__file__).parents[2]
KIT = ROOT / "gpu-kit"


def find() -> None:
    """Make `import plait` mean this checkout, and what the kit holds importable behind the machine's own."""
    folder = unpack(KIT)
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    if "plait" in sys.modules:
        return
    place = [str(ROOT)]
    spec = importlib.util.spec_from_file_location(
        "plait", ROOT / "__init__.py", submodule_search_locations=place
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plait"] = module
    spec.loader.exec_module(module)


def unpack(kit: Path) -> Path | None:
    """The kit's wheels that fit this Python, unpacked once; None without a kit."""
    if not kit.is_dir():
        return None
    folder = kit / f"unpacked-{sys.implementation.cache_tag}-{platform.machine()}"
    for wheel in sorted(kit.glob("*.whl")):
        done = folder / f".{wheel.stem}"
        if fits(wheel.name) and not done.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            done.touch()
    for source in kit.glob("mamba_ssm-*.tar.gz"):
        if not (folder / "mamba_ssm").exists():
            _take_kernels(source, folder)
    return folder if folder.exists() else None


def _take_kernels(source: Path, folder: Path) -> None:
    """Of mamba_ssm's source what is Python, below an empty package: its own imports what CUDA would build."""
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            _, _, name = member.name.partition("/")
            if member.isfile() and name.startswith("mamba_ssm/") and name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(file.read())
    (folder / "mamba_ssm" / "__init__.py").write_text("")


def fits(wheel: str) -> bool:
    """Whether a wheel of this name is for this Python and machine; of Linux, glibc is taken to be recent."""
    python, abi, places = wheel.removesuffix(".whl").split("-")[-3:]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for_python = own in python.split(".") or "py3" in python.split(".") or abi == "abi3"
    machine = platform.machine()
    return for_python and any(
        place == "any" or (place.startswith(("manylinux", "linux")) and place.endswith(machine))
        for place in places.split(".")
    )
