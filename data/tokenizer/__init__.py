"""Tokenizers: text to ids and back, behind one narrow interface.

    interface.py       what a tokenizer is, whatever kind it has
    sentencepiece.py   the kind that `plait data tokenizer` trains: BPE with byte fallback
    huggingface.py     the kind that comes as a folder with tokenizer.json
    loading.py         a path to a tokenizer; finding it in the folder of a corpus or a run
    training.py        a sample of documents to a sentencepiece model

Read in this order.
"""

from .interface import Tokenizer
from .loading import find_tokenizer, load_tokenizer
from .sentencepiece import END_OF_DOCUMENT
from .training import DEFAULT_SAMPLE_BYTES, train_tokenizer

__all__ = [
    "DEFAULT_SAMPLE_BYTES",
    "END_OF_DOCUMENT",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]
