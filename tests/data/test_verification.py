"""`verify` reads everything again: what it finds when a corpus and its manifest part."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from plait.data import verification
from plait.data.build import build
from plait.data.documents import Document
from plait.data.manifest import FileRecord
from plait.data.mask import MaskWriter
from plait.data.megatron import indexed_dataset
from plait.data.shards import Shard
from plait.data.verification import verify
from plait.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path, texts, tokenizer) -> Path:
    documents = [Document(text, "# prompt\n") for text in texts]
    build(tmp_path / "c", documents, tokenizer, mask="prompt")
    return tmp_path / "c"


def change_manifest(corpus: Path, change: Callable[[dict], object]) -> None:
    path = corpus / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def rewrite(corpus: Path, documents: list[list[int]]) -> None:
    """Other documents in the train split, with a mask and a manifest that know of them, but for what
    the documents say themselves."""
    prefix = corpus / "train"
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    tokens = sum(map(len, documents))
    with MaskWriter(corpus / "train.mask") as mask:
        mask.append(np.ones(tokens, dtype=bool))

    def record(tree: dict) -> None:
        split = tree["splits"]["train"]
        split |= {"documents": len(documents), "tokens": tokens}
        for suffix in ("bin", "idx", "mask"):
            split[suffix] |= FileRecord.of(corpus / f"train.{suffix}").model_dump()
        split["mask"]["counted_tokens"] = tokens

    change_manifest(corpus, record)


def test_chunks_of_any_size_agree(corpus: Path, monkeypatch) -> None:
    manifest = verify(corpus)
    tokens = Shard(corpus / "train").num_tokens
    for size in (1 + tokens // 7, tokens - 1, tokens, 997):
        monkeypatch.setattr(verification, "CHUNK_TOKENS", size)
        assert verify(corpus) == manifest


@pytest.mark.parametrize(
    ("documents", "line"),
    [
        ([[5, 6, 1], [7, 360, 1]], r"document 1 holds the id 360, its tokenizer has ids below 360; rebuild"),
        ([[5, 6, 1], [7, 8]], r"document 1 holds the id 8, as its last, not 1; rebuild"),
        ([[5, 1, 1], [7, 1]], r"document 0 holds the id 1, which ends documents, inside of it; rebuild"),
        ([[5, 1], [], [7, 1]], r"train.idx: 1 documents are empty; rebuild"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_documents_that_cannot_be(corpus: Path, documents, line: str, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(verification, "CHUNK_TOKENS", chunk)
    rewrite(corpus, documents)
    with pytest.raises(UserError, match=line):
        verify(corpus)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("splits.train.documents", 3, "documents = 3, the shards say 297"),
        ("splits.train.tokens", 3, "tokens = 3, the shards say"),
        ("splits.train.text_bytes", 3, "bytes_per_token = .*, the shards say"),
        ("splits.train.mask.counted_tokens", 3, "mask.counted_tokens = 3, the mask says"),
        ("unigram_entropy", 1.0, "unigram_entropy = 1.0, the shards say"),
        ("vocab_size", 400, "vocab_size = 400, the tokenizer says 360"),
        ("end_of_document", 2, "end_of_document = 2, the tokenizer says 1"),
        ("tokenizer_sha256", "0" * 64, r"tokenizer.model: not the tokenizer that the manifest names"),
    ],
)
def test_a_manifest_that_does_not_tell_the_truth(corpus: Path, path: str, value, line: str) -> None:
    def change(tree: dict) -> None:
        *above, last = path.split(".")
        for key in above:
            tree = tree[key]
        tree[last] = value

    change_manifest(corpus, change)
    with pytest.raises(UserError, match=line):
        verify(corpus)


@pytest.mark.parametrize(
    "name", ["train.bin", "train.idx", "train.mask", "validation.bin", "tokenizer.model"]
)
def test_any_changed_byte_and_any_missing_file(corpus: Path, name: str) -> None:
    path = corpus / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        verify(corpus)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        verify(corpus)
