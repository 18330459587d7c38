"""Sections that end in each of the ways that one can."""

import os
import sys
import time


def run(setting, results):
    kind = os.environ["KIND_OF_SECTION"]
    results.write("tiny", setting.tiny)
    results.add("rows", {"kind": kind})
    if kind == "raises":
        raise ValueError("a kernel that fails")
    if kind == "dies":
        print("last words", file=sys.stderr, flush=True)
        os.abort()
    if kind == "hangs":
        time.sleep(600)
