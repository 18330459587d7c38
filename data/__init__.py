"""Floor 1: from text to the arrays of a training step. Knows no process group and no config.

    compression.py, documents.py, rows.py, corpus.py   where text comes from, streamed as documents
    tokenizer/          sentencepiece or Hugging Face: training, encoding, decoding
    encoding.py         documents -> tokens, here or in several processes
    build.py            documents -> shuffled shards, tokenizer and manifest in one folder (atomic_folder.py)
    manifest.py         what such a folder says of itself; verification.py reads it all again
    mask.py             PREFIX.mask: which tokens count as targets
    shards.py           PREFIX.bin/.idx in Megatron's format as one stream of tokens
    permutation.py      keyed bijections in plain integers
    mixture.py          the order: sample number -> source and token, a pure function
    window.py           a sample's arrays: tokens, targets, document ids, positions
    loader.py           batches, read ahead in the background

Read in this order.
"""
