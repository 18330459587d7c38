"""The door to Hugging Face: a run's model as a folder that transformers, vLLM and others read, and back.

The format is `nemotron_h`. Out goes the dialect that all its readers know, NVIDIA's own; in come that
one and transformers'. Both ways go by `names.py` (which of our tensors make which of theirs, as data).

Out: `config.py` (what fits, and config.json), `tokenizer.py`, `shards.py` (safetensors files), `card.py`
(README.md), `verify.py` (transformers loads it and agrees), `placing.py` (a folder appears whole) and
`export.py` (all of it). In: `folder.py` (what is there), `read_config.py` (which model it is),
`matching.py` (where each tensor lies), `reading.py` (plait's tensors), then `importing.py` (a run of them)
or `loading.py` (a model to use). `origin.py` is what a run remembers of an import, so that an export
gives it back.
"""

from .export import Exported, export_run
from .importing import Imported, import_folder
from .origin import Dtype

__all__ = ["Dtype", "Exported", "Imported", "export_run", "import_folder"]
