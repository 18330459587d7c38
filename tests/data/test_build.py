import itertools
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from plait.data import build as build_module
from plait.data import encoding
from plait.data.build import Progress, build, num_held_out
from plait.data.manifest import manifest_of, read_manifest
from plait.data.shards import Shard
from plait.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from plait.data.verification import verify
from plait.errors import UserError


def documents_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    shard = Shard(prefix)
    bounds = [shard.document_start(d) for d in range(shard.num_documents + 1)]
    tokens = [shard.read(a, b - a)[0].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(ids[-1] == tokenizer.end_of_document for ids in tokens)
    return [tokenizer.decode(ids[:-1]) for ids in tokens]


def test_every_document_arrives_once_and_shuffled(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    manifest = build(tmp_path / "c", texts, tokenizer, description=["made up"])
    train = documents_of(tmp_path / "c" / "train", tokenizer)
    validation = documents_of(tmp_path / "c" / "validation", tokenizer)
    assert len(validation) == 3
    assert sorted(train + validation) == sorted(texts)
    assert train != sorted(train, key=texts.index)
    assert manifest == read_manifest(tmp_path / "c") == manifest_of(tmp_path / "c" / "train")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "c",
        "manifest.json",
        "tokenizer.model",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def test_manifest_tells_the_truth(tmp_path: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    manifest = build(tmp_path / "c", texts, tokenizer, seed=4)
    assert verify(tmp_path / "c") == manifest
    tokens, _ = (shard := Shard(tmp_path / "c" / "train")).read(0, shard.num_tokens)
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert manifest.unigram_entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert (train.tokens, train.documents) == (len(tokens), 297)
    assert train.text_bytes + validation.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.bytes_per_token == train.text_bytes / train.tokens
    assert (manifest.vocab_size, manifest.dtype, manifest.seed) == (360, "uint16", 4)
    assert manifest.tokenizer_sha256 == load_tokenizer(tmp_path / "c" / "tokenizer.model").fingerprint


def test_same_input_same_bytes(tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch) -> None:
    one = build(tmp_path / "one", texts, tokenizer)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(build_module, "REPORT_DOCUMENTS", 5)
    assert build(tmp_path / "two", iter(texts), tokenizer) == one
    assert build(tmp_path / "three", texts, tokenizer, seed=1).splits != one.splits


def test_large_vocabulary_takes_wider_tokens(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16)
    assert build(tmp_path / "a", texts, tokenizer).dtype == "uint16"
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    monkeypatch.setattr(tokenizer, "end_of_document", 2**16)
    assert build(tmp_path / "b", texts, tokenizer).dtype == "int32"
    assert Shard(tmp_path / "b" / "train").read(0, 1000)[0].max() == 2**16
    monkeypatch.setattr(tokenizer, "vocab_size", 2**31)
    with pytest.raises(UserError, match="does not fit"):
        build(tmp_path / "c", texts, tokenizer)


@pytest.mark.parametrize("stage", ["tokenize", "write train", "write validation"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_build_leaves_nothing(
    tmp_path: Path, texts, tokenizer, stage: str, error: type[BaseException]
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == stage:
            raise error

    with pytest.raises(error):
        build(tmp_path / "c", texts, tokenizer, report=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_failed_rebuild_keeps_the_old_corpus(tmp_path: Path, texts, tokenizer) -> None:
    manifest = build(tmp_path / "c", texts, tokenizer)

    def failing() -> Iterator[str]:
        yield from texts[:50]
        raise UserError("x.jsonl:51: not JSON")

    with pytest.raises(UserError):
        build(tmp_path / "c", failing(), tokenizer)
    assert verify(tmp_path / "c") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_killed_build_leaves_no_corpus_and_the_next_one_clears_up(tmp_path: Path, texts, tokenizer) -> None:
    script = (
        "import sys, time\n"
        "from plait.data.build import build\n"
        "from plait.data.tokenizer import load_tokenizer\n"
        "def documents():\n"
        "    for i in range(5000): yield 'some text'\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(60)\n"
        "build(sys.argv[1], documents(), load_tokenizer(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "c"), str(tokenizer.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "reading\n"
        with pytest.raises(UserError, match="another build"):
            build(tmp_path / "c", texts, tokenizer)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "c").exists()
    build(tmp_path / "c", texts, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_is_replaced_and_what_is_not(tmp_path: Path, texts, tokenizer) -> None:
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=330)
    out = tmp_path / "c"
    out.mkdir()
    build(out, texts, tokenizer)
    assert build(out, texts[:100], tokenizer).splits["train"].documents == 99
    with pytest.raises(UserError, match="was built with tokenizer"):
        build(out, texts, other)
    assert build(out, texts, other, force=True).vocab_size == 330
    # The folder's own tokenizer may be the one to rebuild with.
    build(out, texts, load_tokenizer(out / "tokenizer.model"))
    (out / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes.md"):
        build(out, texts, other, force=True)
    with pytest.raises(UserError, match="is a file"):
        build(tmp_path / "other.model", texts, tokenizer)
    (tmp_path / "m").mkdir()
    shutil.copy(out / "train.bin", tmp_path / "m" / "train.bin")
    with pytest.raises(UserError, match="not built here"):
        build(tmp_path / "m", texts, tokenizer)


def test_held_out_documents() -> None:
    assert [num_held_out(n) for n in (2, 100, 199, 10_000, 10**9)] == [1, 1, 1, 100, 10_000]
    assert num_held_out(1000, 0.05) == 50
    assert num_held_out(10, 0.01) == 1
    assert num_held_out(10, 3) == 3
    assert num_held_out(1, 0) == 0
    for documents, validation in ((1, None), (10, 10), (10, -1.0), (10, 1.5), (10, math.nan), (2, 0.9)):
        with pytest.raises(UserError, match="validation"):
            num_held_out(documents, validation)


def test_no_validation(tmp_path: Path, texts, tokenizer) -> None:
    assert set(build(tmp_path / "c", texts, tokenizer, validation=0).splits) == {"train"}
    with pytest.raises(UserError, match="no documents"):
        build(tmp_path / "d", [], tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_verify_finds_one_changed_byte(tmp_path: Path, texts, tokenizer) -> None:
    build(tmp_path / "c", texts, tokenizer)
    path = tmp_path / "c" / "train.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train.bin: its SHA-256"):
        verify(tmp_path / "c")
    path.write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"train.bin"):
        Shard(tmp_path / "c" / "train")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        verify(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text('{"format": "plait corpus 1"')
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text('{"format": "plait corpus 2"}')
    with pytest.raises(UserError, match="format"):
        read_manifest(tmp_path / "c")
