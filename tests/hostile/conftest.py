"""A run, and a Hugging Face folder of it, to be harmed."""

import sys
from pathlib import Path

import pytest

from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer

# `hostility.py` is found by its name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _small(one_thread):
    """The models are so small that a second thread only costs."""


@pytest.fixture
def run(tiny: dict) -> Path:
    """A run with one checkpoint, of step 0."""
    trainer = Trainer(parse_config(tiny, "test"))
    trainer.checkpoints.save(0, trainer.state.tensors(), trainer.state.facts(trainer.config))
    trainer.checkpoints.wait()
    trainer.close()
    trainer.folder.prepare(trainer.config)
    return trainer.folder.path


@pytest.fixture
def step(run: Path) -> Path:
    return run / "checkpoints" / "step-00000000"


@pytest.fixture
def huggingface(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three files of tensors, an index and a config.json."""
    from plait.pretrain.huggingface import export, export_run

    # transformers is not asked whether it agrees: what is read here is read by plait.
    monkeypatch.setattr(
        export, "check_model", lambda *_, **__: type("Yes", (), {"logit_error": 0.0, "positions": 1})
    )
    monkeypatch.setattr(export, "check_tokenizer", lambda *_, **__: None)
    export_run(run, tmp_path / "hf", shard_bytes=40_000)
    return tmp_path / "hf"
