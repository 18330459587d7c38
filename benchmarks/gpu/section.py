"""One section in its own process: `python -m gpu.section MODULE RESULTS [--tiny] [--interpret]`."""

import argparse
import importlib
from pathlib import Path

from .packages import find
from .setting import Results, Setting


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    find()
    setting = Setting(args.results.parent, args.tiny, args.interpret)
    importlib.import_module(args.module).run(setting, Results(args.results))


if __name__ == "__main__":
    main()
