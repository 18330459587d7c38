"""`plait import hf` from the command line: what it prints, what it makes, and a mistake's one line."""

import shutil
import sys

import pytest
import yaml
from transformers import NemotronHConfig, NemotronHForCausalLM
from typer.testing import CliRunner

from plait.launch.cli import app, main
from plait.pretrain.huggingface import import_folder


@pytest.fixture
def folder(corpus, tmp_path):
    """A model of transformers, with the tokenizer of the corpus."""
    config = NemotronHConfig(
        vocab_size=321,
        hidden_size=32,
        layers_block_type=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
    )
    NemotronHForCausalLM(config).save_pretrained(tmp_path / "hf")
    shutil.copyfile(corpus / "tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    return tmp_path / "hf"


def plait(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def mistake(monkeypatch, capsys, *words) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_from_a_folder_to_a_training_in_three_commands(folder, tiny, corpus, tmp_path):
    run = tmp_path / "imported"
    result = plait("import", "hf", folder, run)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"imported {folder} to {run}"
    assert lines[1].startswith("M*, ")
    assert lines[1].endswith(" parameters, float32 in its files")
    assert lines[-2] == f"build a corpus for it: plait data build CORPUS --corpus TEXTS --tokenizer {run}"
    assert lines[-1] == f"train it on: plait train CONFIG checkpoint.init_from={run}"

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("a token and a state and a space\n" * 40)
    result = plait("data", "build", tmp_path / "mine", "--corpus", texts, "--tokenizer", run)
    assert result.exit_code == 0, result.output
    del tiny["model"]
    tiny["data"] = {"blend": str(tmp_path / "mine" / "train"), "seq_len": 50}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny))
    result = plait("train", config, "train.steps=3", f"checkpoint.init_from={run}")
    assert result.exit_code == 0, result.output
    assert f"begun with the weights of step 0 of {run}" in " ".join(result.output.split())
    assert f"init_from: {run}" in plait("config", "show", tmp_path / "run" / "config.yaml").output


def test_help_names_the_option():
    output = plait("import", "hf", "--help").output
    assert "--carry-unknown" in output
    assert "HF_DIR" in output


def test_a_folder_that_is_none(monkeypatch, capsys, tmp_path):
    assert mistake(monkeypatch, capsys, "import", "hf", "nowhere", tmp_path / "run") == (
        "plait: error: nowhere: no such folder; name one that holds config.json and safetensors files\n"
    )


def test_an_imported_model_is_no_training(monkeypatch, capsys, folder, tiny, tmp_path):
    run = import_folder(folder, tmp_path / "run").path
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny))
    assert mistake(monkeypatch, capsys, "train", config) == (
        f"plait: error: run.dir = {run} is an imported model, and no training to go on with; "
        f"set checkpoint.init_from = {run} and another run.dir\n"
    )
