"""A model's own continuation of texts: prompts through the chunked form, then a token at a time.

Read `decoding.py` (prompts in, ids out: padding, caches, the end), `sampling.py` (from logits to an
id, with random numbers that belong to a row alone) and `streaming.py` (ids to text as they come).
What the layers keep between tokens is in each mixer's file of `pretrain/model/`.
"""

from .decoding import collect, decode
from .sampling import GREEDY, Sampling
from .streaming import TextStream

__all__ = ["GREEDY", "Sampling", "TextStream", "collect", "decode"]
