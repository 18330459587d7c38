"""The door to Hugging Face: a run's model as a folder that transformers, vLLM and others read.

The target is `nemotron_h`, in the dialect that all its readers know, NVIDIA's own. Read `names.py`
(which of our tensors make which of theirs, as data for both directions), `config.py` (what fits, and
config.json), `tokenizer.py` (sentencepiece as tokenizer.json), `shards.py` (safetensors files),
`card.py` (README.md), `verify.py` (transformers loads it and agrees), `placing.py` (a folder appears
whole) and `export.py` (all of it).
"""

from .export import Exported, export_run

__all__ = ["Exported", "export_run"]
