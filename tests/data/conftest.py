"""Small corpora, tokenizers and shards for the tests of the data floor."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plait.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

CODES = {np.uint8: 1, np.int32: 4, np.int64: 5, np.float32: 7, np.uint16: 8}

WriteShards = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of odd lengths, with indentation, digits and blank lines."""
    verbs = ["read", "write", "merge", "split", "train", "order", "weigh"]
    nouns = ["token", "batch", "window", "plan", "shard", "epoch", "source", "index"]
    return [
        f"def {verbs[i % 7]}_{nouns[i % 8]}(x):\n    y = x * {i}\n\n    return ["
        + ", ".join(f"y + {j}" for j in range(i % 23))
        + "]\n"
        for i in range(300)
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "small.model", vocab_size=360)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE of 400 ids as transformers saves it: 0 closes a document, 1 pads."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trained.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("tokenizer") / "hf"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_tokenizer(hf_folder: Path) -> Tokenizer:
    return load_tokenizer(hf_folder)


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Writes PREFIX.bin/.idx from documents given as lists of sequence lengths, by the format's
    description and not by any library; returns the prefix and the stream of tokens."""

    def write(
        documents: Sequence[Sequence[int]], name: str = "raw", dtype: type = np.uint16, modes: bool = False
    ) -> tuple[Path, np.ndarray]:
        lengths = np.array([n for document in documents for n in document], dtype=np.int32)
        tokens = np.random.default_rng(0).integers(0, 200, int(lengths.sum())).astype(dtype)
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.dtype.itemsize
        indices = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
        prefix = tmp_path / name
        Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
        Path(f"{prefix}.idx").write_bytes(
            b"MMIDIDX\0\0"
            + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(indices))
            + lengths.tobytes()
            + pointers.tobytes()
            + indices.tobytes()
            + (bytes(len(lengths)) if modes else b"")
        )
        return prefix, tokens.astype(np.int64)

    return write
