"""Check and measure plait on the GPU at hand: `make gpu`, or `python -m gpu` in benchmarks/.

--interpret  on the CPU, through Triton's interpreter: rehearses the checks, its times mean nothing
--tiny       at sizes that take moments
--only       these sections
--patience   multiplies every section's budget
--out        the folder of results; by default benchmarks/results/DEVICE
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from .harness import SECTIONS, run_all
from .packages import KIT, find
from .report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--patience", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"make gpu: {error}; it takes the machine's own torch (2.11 or later) and triton (3.6 or later)"
        )
    find()
    try:
        import pydantic  # noqa: F401
    except ImportError:
        sys.exit(
            "make gpu: pydantic is not installed: run make gpu-kit where there is a network, and copy "
            f"{KIT} here"
        )
    if not args.interpret and not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no GPU here; --interpret --tiny rehearses without one")
    name = "interpreter" if args.interpret else torch.cuda.get_device_name()
    out = (
        args.out or Path(__file__).parents[1] / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower())
    ).absolute()

    words = [word for word in ("--tiny", "--interpret") if getattr(args, word[2:])]
    environment = {"PLAIT_KERNELS": "triton", "TRITON_DEFAULT_FP_FUSION": "1"}
    if args.interpret:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    sections = tuple(section for section in SECTIONS if not args.only or section.name in args.only)

    def done(everything: dict[str, Any]) -> None:
        write_report(everything, name, out)
        last = list(everything)[-1]
        print(f"{last}: {everything[last]['state']} after {everything[last]['seconds']} s", flush=True)

    everything = run_all(sections, out, words, patience=args.patience, done=done, environment=environment)
    print(out / "report.md")
    wrong = [name for name, section in everything.items() if section["state"] != "done"]
    if wrong:
        sys.exit(f"not finished: {', '.join(wrong)}; their last words are in the report")


if __name__ == "__main__":
    main()
