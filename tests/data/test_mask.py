"""Masks: written beside shards, read by windows, and their mistakes."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.data.build import build
from plait.data.documents import Document
from plait.data.manifest import read_manifest
from plait.data.mask import MaskWriter, check_mask, map_mask, read_bits
from plait.data.plan import Plan, open_blend
from plait.data.shards import Shard
from plait.data.tokenizer import Tokenizer
from plait.data.verification import verify
from plait.data.window import IGNORE, window
from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.loss import StepCounts, compute_loss
from plait.pretrain.trainer import Trainer


@pytest.fixture
def pairs(texts: list[str]) -> list[Document]:
    """A third of the documents have no prompt."""
    return [Document(text, f"# number {i}\n" if i % 3 else "") for i, text in enumerate(texts)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=8))
def test_the_layout_is_the_documented_one(tmp_path: Path, pieces: list[list[bool]]) -> None:
    path = tmp_path / "x.mask"
    bits = [bit for piece in pieces for bit in piece]
    with MaskWriter(path) as writer:
        for piece in pieces:
            writer.append(np.array(piece, dtype=bool))
    assert (writer.tokens, writer.counted) == (len(bits), sum(bits))
    content = path.read_bytes()
    assert content[:24] == b"PLAITMSK" + struct.pack("<QQ", 1, len(bits))
    value = int.from_bytes(content[24:], "little")
    assert [bool(value >> i & 1) for i in range(len(bits))] == bits
    assert value >> len(bits) == 0
    check_mask(path, len(bits))
    for start in range(len(bits)):
        for length in range(1, len(bits) - start + 1, 3):
            assert read_bits(map_mask(path), start, length).tolist() == bits[start : start + length]


def test_prompts_are_no_targets(tmp_path: Path, pairs: list[Document], tokenizer: Tokenizer) -> None:
    manifest = build(tmp_path / "c", pairs, tokenizer, mask="prompt", validation=30)
    plain = build(tmp_path / "plain", pairs, tokenizer, validation=30)
    assert manifest.splits["train"].bin == plain.splits["train"].bin
    assert plain.splits["train"].mask is None
    assert verify(tmp_path / "c") == manifest == read_manifest(tmp_path / "c")
    shard = Shard(tmp_path / "c" / "train")
    by_text = {document.prompt + document.text: document for document in pairs}
    total = 0
    for number in range(shard.num_documents):
        begin, end = shard.document_start(number), shard.document_start(number + 1)
        ids, counted = shard.tokens(begin, end - begin).tolist(), shard.counted(begin, end - begin)
        document = by_text[tokenizer.decode(ids[:-1])]
        prompt, text = tokenizer.encode(document.prompt), tokenizer.encode(document.text)
        assert ids == [*prompt, *text, tokenizer.end_of_document]
        assert counted.tolist() == [False] * len(prompt) + [True] * (len(text) + 1)
        total += int(counted.sum())
    record = manifest.splits["train"].mask
    assert record is not None
    assert record.counted_tokens == total


@pytest.mark.parametrize("isolate", [True, False])
def test_windows_mask_exactly_those_targets(tmp_path: Path, pairs, tokenizer, isolate: bool) -> None:
    build(tmp_path / "masked", pairs, tokenizer, mask="prompt", validation=0)
    build(tmp_path / "plain", pairs, tokenizer, validation=0)
    (sources, shards), (same, others) = (
        open_blend({str(tmp_path / name / "train"): 1}) for name in ("masked", "plain")
    )
    plan, other = (Plan.start(s, seed=5, seq_len=33) for s in (sources, same))
    (shard,) = shards.values()
    hidden = 0
    for index in range(200):
        masked = window(plan, shards, index, isolate_documents=isolate)
        plain = window(other, others, index, isolate_documents=isolate)
        counted = shard.counted(plan.sample(index).token + 1, 33)
        assert np.array_equal(masked["targets"], np.where(counted, plain["targets"], IGNORE))
        for name in ("tokens", "document_ids", "positions"):
            assert np.array_equal(masked[name], plain[name])
        hidden += int((~counted).sum())
    assert hidden > 500


def test_training_counts_only_what_the_mask_lets(tmp_path: Path, pairs, tokenizer, tiny: dict) -> None:
    """The mean is over the targets that count; where none does, it is 0 and nothing moves."""
    build(tmp_path / "c", pairs, tokenizer, mask="prompt", validation=0)
    prefix = tmp_path / "c" / "train"
    tiny["model"] |= {"pattern": "M", "vocab_size": 360}
    tiny["data"] = {"blend": {str(prefix): 1}, "seq_len": 50}
    trainer = Trainer(parse_config(tiny, "test"))
    batch = _batch(trainer)
    counted = int((batch["targets"] != IGNORE).sum())
    parts = compute_loss(
        trainer.state.model,
        trainer.micro_batches(batch)[0],
        StepCounts(targets=1, tokens=1, sequences=1),
        dtype=trainer.dtype,
    )
    metrics = trainer.train_step(batch)
    assert metrics["loss"] == pytest.approx(float(parts.cross_entropy) / counted, rel=1e-5)
    hidden = np.zeros(Shard(prefix).num_tokens, dtype=bool)
    with MaskWriter(tmp_path / "c" / "train.mask") as writer:
        writer.append(hidden)
    tiny["run"]["dir"] += "-hidden"
    nothing = Trainer(parse_config(tiny, "test"))
    metrics = nothing.train_step(_batch(nothing))
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)


def _batch(trainer: Trainer) -> dict[str, np.ndarray]:
    with trainer._loader() as loader:
        return loader.next()[0]


def test_a_mask_changes_the_fingerprint(tmp_path: Path, pairs, tokenizer) -> None:
    build(tmp_path / "c", pairs, tokenizer, mask="prompt", validation=0)
    build(tmp_path / "d", pairs, tokenizer, validation=0)
    assert Shard(tmp_path / "c" / "train").content != Shard(tmp_path / "d" / "train").content


def test_every_cut_and_every_stranger_is_noticed(write_shards) -> None:
    prefix, _ = write_shards([[30], [13]])
    path = Path(f"{prefix}.mask")
    with MaskWriter(path) as writer:
        writer.append(np.ones(43, dtype=bool))
    assert Shard(prefix).masked
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            Shard(prefix)
        assert str(error.value).startswith(f"{path}: ")
    path.write_bytes(whole[:8] + struct.pack("<Q", 2) + whole[16:])
    with pytest.raises(UserError, match="version 2 of the mask format"):
        Shard(prefix)
    with MaskWriter(path) as writer:
        writer.append(np.ones(44, dtype=bool))
    with pytest.raises(UserError, match="masks 44 tokens, but its shard holds 43; rebuild"):
        Shard(prefix)


def test_a_mask_that_came_or_went_is_noticed(tmp_path: Path, pairs, tokenizer) -> None:
    build(tmp_path / "c", pairs, tokenizer, mask="prompt", validation=0)
    mask = tmp_path / "c" / "train.mask"
    content = mask.read_bytes()
    mask.unlink()
    with pytest.raises(UserError, match=r"train.mask: is missing, against its manifest"):
        Shard(tmp_path / "c" / "train")
    build(tmp_path / "d", pairs, tokenizer, validation=0)
    (tmp_path / "d" / "train.mask").write_bytes(content)
    with pytest.raises(UserError, match=r"train.mask: is there, against its manifest"):
        Shard(tmp_path / "d" / "train")


def test_a_mask_without_prompts_is_refused(tmp_path: Path, texts, tokenizer) -> None:
    with pytest.raises(UserError, match="no document has a prompt; name the rows' keys with --prompt-key"):
        build(tmp_path / "c", texts, tokenizer, mask="prompt")
    assert list(tmp_path.iterdir()) == []
