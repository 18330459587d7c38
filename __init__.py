"""Plait: distributed pretraining of language models that braid Mamba-2, attention and experts.

A token's way through the house, which is also the order to read it in:

    data/corpus.py -> data/tokenizer/ -> data/shards.py -> data/mixture.py
      -> pretrain/trainer.py -> pretrain/model/hybrid.py -> pretrain/model/{mamba2,attention,mlp,moe}.py
      -> kernels/* -> pretrain/loss.py -> pretrain/checkpoint.py -> pretrain/huggingface/export.py

Imports only go down: launch -> pretrain -> parallel -> data, kernels -> errors.
"""

__version__ = "0.1.0"
