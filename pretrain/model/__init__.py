"""The model: one `Hybrid`, one mixer a letter of the pattern, one file a mixer.

Read `hybrid.py` (the stack), then `mamba2.py`, `attention.py`, `mlp.py`, `moe.py` (the mixers M, *,
- and E), `layers.py` (what they are made of) and `parameters.py` (how a parameter begins). The files
hold the architecture and nothing else: dtypes of storage, optimizers and files are decided outside.
"""

from .hybrid import EXACT_PARAMETERS, Hybrid, build_model
from .layers import Cache, Cut, Packing, Report

__all__ = ["EXACT_PARAMETERS", "Cache", "Cut", "Hybrid", "Packing", "Report", "build_model"]
