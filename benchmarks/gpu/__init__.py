"""Everything of plait's that a GPU can check or measure, in one command: `make gpu`.

It starts with the standard library alone, so that a machine with torch, triton and numpy can run it:
`packages.py` finds plait in this checkout, and the rest in the folder that `make gpu-kit` (`kit.py`) filled.

Read `__main__.py` (the options), `harness.py` (a process a section, each with a budget), `section.py` (what
runs in one), the sections in the order of `SECTIONS`, then `report.py` and `plot.py` (what is made of it).
"""
