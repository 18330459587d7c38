"""The `plait data` commands, from text to the batch of a step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from plait.data.plan import Plan, open_blend
from plait.data.window import window
from plait.errors import UserError
from plait.launch.cli import app

CONFIG = """
run: {{dir: runs/x, seed: 3}}
model: {{pattern: M, d_model: 8, vocab_size: 360, mamba: {{num_heads: 2, head_dim: 4}}}}
data:
  blend: {{{prefix}: 1}}
  seq_len: 32
train: {{steps: 10, batch_size: 4}}
optim: {{lr: 1e-3}}
"""


def plait(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The folder that `tokenizer` and `build` make from a JSONL file."""
    folder = tmp_path_factory.mktemp("commands")
    source = folder / "x.jsonl"
    source.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    options = ("--corpus", source, "--text-key", "body")
    result = plait("data", "tokenizer", folder / "t.model", *options, "--vocab-size", 360)
    assert "360 ids" in result.stdout
    result = plait(
        "data", "build", folder / "c", *options, "--tokenizer", folder / "t.model", "--validation", 0.1
    )
    assert "c/train: 270 documents" in result.stdout
    assert "c/validation: 30 documents" in result.stdout
    return folder / "c"


def test_inspect_shows_counts_and_text(corpus: Path) -> None:
    shown = plait("data", "inspect", corpus).stdout
    for expected in ("train", "validation", "270", "uint16", "nats a token", "documents by tokens", "def "):
        assert expected in shown
    assert "270" in plait("data", "inspect", corpus / "train").stdout
    assert "what the manifest says" in plait("data", "verify", corpus).stdout


def test_inspect_takes_shards_without_a_manifest(write_shards) -> None:
    prefix, stream = write_shards([[], [3, 2], [4]])
    shown = plait("data", "inspect", f"{prefix}.bin").stdout
    assert " ".join(map(str, stream[:5])) in shown


def test_inspect_shows_masks_and_either_tokenizer(tmp_path: Path, hf_folder: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"prompt": "read: ", "completion": "token batch"}) + "\n")
    options = ("--corpus", source, "--tokenizer", hf_folder, "--mask", "prompt", "--validation", 0)
    built = plait("data", "build", tmp_path / "c", *options, "--workers", 1).stdout
    shown = plait("data", "inspect", tmp_path / "c").stdout
    for expected in ("huggingface, 400 ids", "tokens; the rest is masked", "read: token batch"):
        assert expected in shown
    (targets,) = re.findall(r"(\d+) of them targets", built)
    assert f"targets of train  {targets} tokens" in shown


def test_batch_is_the_samples_of_that_step(corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(prefix=corpus / "train"))
    plait("data", "batch", config, "train.batch_size=5", "--step", 3, "--out", tmp_path / "b.npz")
    arrays = np.load(tmp_path / "b.npz")
    sources, shards = open_blend({str(corpus / "train"): 1.0})
    plan = Plan.start(sources, seed=3, seq_len=32)
    assert sorted(arrays) == ["document_ids", "positions", "targets", "tokens"]
    for row, index in enumerate(range(10, 15)):
        for name, expected in window(plan, shards, index).items():
            assert np.array_equal(arrays[name][row], expected)
    with pytest.raises(UserError, match="cannot be written"):
        plait("data", "batch", config, "--step", 1, "--out", tmp_path / "no" / "b.npz")


def test_mistakes_are_one_line(tmp_path: Path, corpus: Path) -> None:
    source = corpus.parent / "x.jsonl"
    with pytest.raises(UserError, match="--text-key"):
        plait("data", "tokenizer", tmp_path / "t.model", "--corpus", source, "--vocab-size", 300)
    with pytest.raises(UserError, match=r"no such file"):
        plait("data", "inspect", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no .idx file"):
        plait("data", "inspect", tmp_path)
