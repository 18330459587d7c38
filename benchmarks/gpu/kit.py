"""The folder of wheels that `make gpu` needs on a machine without a network: `make gpu-kit`.

    python -m gpu.kit [--python 3.11 3.12 3.13] [--machine x86_64 aarch64] [--mamba-ssm]

For Linux. torch, triton and numpy are not in it: the GPU machine has its own. With --mamba-ssm its source
comes along, whose Triton kernels need no compiler of CUDA, to be measured beside plait's.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .packages import KIT, ROOT

__all__ = ["NEEDED", "main"]

NEEDED = ("pydantic", "pyyaml", "typer", "rich")
PLATFORMS = ("manylinux_2_17", "manylinux2014", "manylinux_2_28")
MOST_MEGABYTES = 60


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12", "3.13"])
    parser.add_argument("--machine", nargs="+", default=["x86_64", "aarch64"])
    parser.add_argument("--mamba-ssm", action="store_true")
    parser.add_argument("--out", type=Path, default=KIT)
    args = parser.parse_args(arguments)

    names = [*NEEDED, *(["einops"] if args.mamba_ssm else [])]
    for python in args.python:
        for machine in args.machine:
            platforms = [f"--platform={kind}_{machine}" for kind in PLATFORMS]
            words = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
            _download(args.out, *words, f"--constraint={ROOT / 'constraints.txt'}", *names)
    if args.mamba_ssm:
        # Its setup asks the installed torch what it would build; nothing is built.
        os.environ["MAMBA_SKIP_CUDA_BUILD"] = "TRUE"
        _download(args.out, "--no-deps", "--no-build-isolation", "--no-binary=mamba-ssm", "mamba-ssm")
    megabytes = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file()) / 1e6
    print(
        f"{args.out}: {megabytes:.1f} MB; copy the repository with it to the GPU machine, and there: make gpu"
    )
    if megabytes > MOST_MEGABYTES:
        sys.exit(f"more than {MOST_MEGABYTES} MB: name fewer by --python and --machine")


def _download(out: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, f"--dest={out}", *words], check=False)
    if done.returncode:
        sys.exit(f"make gpu-kit: pip download failed for {words[-1]}; its words stand above")


if __name__ == "__main__":
    main()
