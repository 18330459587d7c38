"""A token of one document changes no bit of another's SSM, convolution and attention outputs, anywhere."""

import pytest
import torch
from layouts import name

LENGTH = 61
DOCUMENTS = [[7, 9, 21, 3, 1, 20], [16, 16, 16, 13], [61], [31, 30]]
"""Lengths of the documents of each row; at 4 ranks the cuts lie at 16, 32 and 48."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "layout",
    [
        {"sp": 4, "state_exchange": "ring"},
        {"sp": 4, "state_exchange": "gather"},
        {"sp": 4, "state_exchange": "scan"},
        {"sp": 2, "tp": 2},
        {"tp": 4},
    ],
    ids=name,
)
def test_no_bit_of_another_document(ranks, tree, layout, dtype):
    draw = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS])
    tokens = torch.randint(0, 331, ids.shape, generator=draw)
    # In the first row the third document, which reaches over three ranks; in the others the first.
    touched = torch.tensor([2, 0, 0, 0])
    place = torch.tensor([17, 3, 30, 15])
    changed = tokens.clone()
    changed[torch.arange(4), place] = (tokens[torch.arange(4), place] + 5) % 331
    config = tree({"model.pattern": "M*M*", "train.dtype": dtype, "data.seq_len": LENGTH}, **layout)
    config["train"]["batch_size"] = len(DOCUMENTS)
    found = ranks(
        "mixers", config, tokens=tokens.tolist(), document_ids=ids.tolist(), changed=changed.tolist()
    )
    after_it = (ids == touched[:, None]) & (torch.arange(LENGTH) >= place[:, None])
    moved = torch.zeros(4, 4, LENGTH, dtype=torch.bool)
    for rank in found:
        here = slice(rank["first"], rank["end"])
        for layer, (before, after) in enumerate(zip(rank["before"], rank["after"], strict=True)):
            real = slice(0, rank["end"] - rank["first"])
            moved[layer, :, here] = (before[:, real] != after[:, real]).any(-1)
    assert not moved[:, ~after_it].any()
    # Everything from the token on, in its document, has seen it: the states and keys did travel.
    assert moved[:, after_it].all()
