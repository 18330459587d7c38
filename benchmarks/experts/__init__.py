"""The parts of `benchmarks/moe.py`.

`shapes.py` says what is measured and `volumes.py` holds the closed formulas; `forms.py` is the layer and
its rivals on one rank; `imbalance.py` and `sent.py` run on the ranks that `ranks.py` starts; `report.py`
makes the tables.
"""
