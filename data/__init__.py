"""Floor 1: from text to the arrays of a training step. Knows no process group and no config.

    corpus.py       where text comes from, streamed as documents
    tokenizer.py    sentencepiece BPE: training, encoding, decoding
    build.py        documents -> shuffled shards, tokenizer and manifest in one folder
    manifest.py     what such a folder says of itself, and its verification
    shards.py       PREFIX.bin/.idx in Megatron's format as one stream of tokens
    permutation.py  keyed bijections in plain integers
    mixture.py      the order: sample number -> source and token, a pure function
    window.py       a sample's arrays: tokens, targets, document ids, positions
    loader.py       batches, read ahead in the background

Read in this order.
"""
