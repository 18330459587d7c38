"""The parts of `benchmarks/sequence_parallel.py`.

`volumes.py` holds the closed formulas, `over_heads.py` the rival; `layer.py`, `fold.py` and `training.py`
run on the ranks that `ranks.py` starts; `report.py` makes the tables and `plot.py` the picture.
"""
