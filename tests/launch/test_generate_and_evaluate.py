"""`plait generate` and `plait evaluate`: what they print, and the one line of each mistake."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus) -> Path:
    """A run of four steps."""
    from plait.pretrain.callbacks import Checkpointing
    from plait.pretrain.config_file import parse_config
    from plait.pretrain.trainer import Trainer

    folder = tmp_path_factory.mktemp("runs") / "run"
    tree = yaml.safe_load(f"""
        run: {{dir: {folder}}}
        model:
          pattern: M*-E
          d_model: 32
          vocab_size: 330
          mamba: {{num_heads: 4, head_dim: 16, d_state: 8, num_groups: 2, chunk_size: 16}}
          attention: {{num_heads: 4, num_kv_heads: 2, head_dim: 8}}
          mlp: {{d_ff: 48}}
          moe: {{num_experts: 4, top_k: 2, d_expert: 24, d_shared: 16}}
        data: {{blend: {{{corpus / "train"}: 1.0}}, validation: {corpus / "validation"}, seq_len: 50}}
        train: {{steps: 4, batch_size: 4, dtype: float32}}
        optim: {{lr: 0.01}}
        checkpoint: {{every: 2}}
        log: {{tensorboard: false}}
        evaluate: {{batches: 2}}
    """)
    Trainer(parse_config(tree, "test"), [Checkpointing()]).run()
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """The run, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def assert_line(result, expected, **paths):
    code, _, text = result
    for name, path in paths.items():
        text = text.replace(str(path), name)
    assert (code, text) == (2, f"plait: error: {expected}\n")


def test_one_prompt(plait, trained):
    code, out, err = plait("generate", trained, "--prompt", "state space é", "--max-tokens", 9)
    assert code == 0
    assert out.startswith("state space é")
    assert out.endswith("\n")
    assert "\x1b" not in out
    assert err.startswith("9 tokens in ")
    assert plait("generate", trained, "--prompt", "state space é", "--max-tokens", 9)[1] == out
    other = plait("generate", trained, "--prompt", "state space é", "--max-tokens", 9, "--seed", 1)
    assert other[1] != out


def test_prompts_from_everywhere_are_what_they_are_alone(plait, trained, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("chunk token decay", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("routér".encode())))
    options = ("--max-tokens", 6, "--dtype", "float64")
    files = ("--prompt-file", tmp_path / "p.txt", "--prompt-file", "-")
    code, out, _ = plait("generate", trained, "--prompt", "x", *files, *options)
    assert code == 0
    alone = [
        plait("generate", trained, "--prompt", text, *options)[1]
        for text in ("x", "chunk token decay", "routér")
    ]
    headed = [f"== {number} of 3\n{text}" for number, text in enumerate(alone, start=1)]
    assert out == "".join(headed)


def test_a_run_its_export_and_transformers_write_the_same(plait, trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ("--prompt", "expert router", "--max-tokens", 24, "--temperature", 0)
    code, text, _ = plait("generate", f"{trained}@2", *words)
    assert code == 0
    assert plait("generate", trained, *words)[1] != text
    assert plait("export", trained, tmp_path / "hf", "--step", 2)[0] == 0
    assert plait("generate", tmp_path / "hf", *words)[1] == text
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("expert router", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) + "\n" == text


MISTAKES = {
    "no such run": (
        ("nowhere", "--prompt", "x"),
        "nowhere: no run is here (it has no config.yaml); name a run's folder",
    ),
    "no such step": (("RUN@3", "--prompt", "x"), "RUN: holds no checkpoint of step 3; choose one of 2, 4"),
    "a folder of something else": (
        ("CORPUS", "--prompt", "x"),
        "CORPUS: neither a run (config.yaml) nor a Hugging Face folder (config.json)",
    ),
    "no prompt": (("RUN",), "no prompt; give --prompt TEXT or --prompt-file FILE"),
    "an empty prompt": (
        ("RUN", "--prompt", "x", "--prompt", ""),
        "--prompt 2: is empty; a model says what follows a text, not how one begins",
    ),
    "a file that is not there": (
        ("RUN", "--prompt-file", "nowhere.txt"),
        "--prompt-file nowhere.txt: No such file or directory",
    ),
    "a file that is no text": (
        ("RUN", "--prompt-file", "CORPUS/train.idx"),
        "--prompt-file CORPUS/train.idx: not UTF-8; convert it first",
    ),
    "no tokens": (("RUN", "--prompt", "x", "--max-tokens", "0"), "--max-tokens = 0: give 1 or more"),
    "a negative temperature": (
        ("RUN", "--prompt", "x", "--temperature", "-1"),
        "temperature = -1.0: give 0, which is greedy, or more",
    ),
    "an empty nucleus": (
        ("RUN", "--prompt", "x", "--top-p", "0"),
        "top_p = 0.0: give more than 0, and 1 at most",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_generate(mistake, plait, trained, corpus):
    words, line = MISTAKES[mistake]
    words = [word.replace("RUN", str(trained)).replace("CORPUS", str(corpus)) for word in words]
    assert_line(plait("generate", *words), line, RUN=trained, CORPUS=corpus)


def test_a_run_without_a_tokenizer(plait, copy):
    (copy / "tokenizer.model").unlink()
    line = "RUN: has no tokenizer, so it reads no text; put its tokenizer.model there"
    assert_line(plait("generate", copy, "--prompt", "x"), line, RUN=copy)


def test_a_run_without_a_checkpoint(plait, copy):
    shutil.rmtree(copy / "checkpoints")
    line = "RUN: holds no whole checkpoint yet; train on"
    assert_line(plait("generate", copy, "--prompt", "x"), line, RUN=copy)
    assert_line(plait("evaluate", copy), line, RUN=copy)


def test_evaluate_prints_a_line_a_source_and_the_total(plait, trained, corpus, tmp_path):
    sources = [corpus / "validation", corpus / "train"]
    shards = [word for source in sources for word in ("--shards", source)]
    code, out, err = plait("evaluate", trained, *shards, "--out", tmp_path / "e")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    lines = out.replace("\n", " ")
    for part in (*record["sources"], record["total"]):
        assert f"{part['loss']:.4f}" in lines
        assert f"{part['bits_per_byte']:.4f}" in lines
    assert "step 4 of" in lines
    assert (tmp_path / "e" / "loss_by_position.png").is_file()


def test_evaluate_writes_into_the_run_by_default(plait, copy):
    assert plait("evaluate", copy, "--batches", 1)[0] == 0
    record = json.loads((copy / "evaluation" / "step-00000004" / "evaluation.json").read_text())
    assert record["total"]["windows"] == 4


def test_mistakes_of_evaluate(plait, trained, corpus, tmp_path):
    line = "nowhere: no run is here (it has no config.yaml); name a run's folder"
    assert_line(plait("evaluate", "nowhere"), line)
    line = "nowhere/x.bin: no such file; shards are named by their path without .bin and .idx"
    assert_line(plait("evaluate", trained, "--shards", "nowhere/x"), line)
    assert_line(plait("evaluate", trained, "--batches", 0), "batches = 0: give 1 or more")
    (tmp_path / "file").write_text("in the way")
    line = "FILE: File exists; name another folder with --out"
    assert_line(plait("evaluate", trained, "--out", tmp_path / "file"), line, FILE=tmp_path / "file")


def test_shards_of_another_tokenizer(plait, trained, tmp_path):
    from plait.data.build import build
    from plait.data.tokenizer import train_tokenizer

    texts = [f"other words {i} make other pieces\n" * 40 for i in range(9)]
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=300)
    build(tmp_path / "other", texts, other, validation=1)
    line = "OTHER/train: built with another tokenizer than the one of RUN; rebuild the corpus with that one"
    result = plait("evaluate", trained, "--shards", tmp_path / "other" / "train")
    assert_line(result, line, RUN=trained, OTHER=tmp_path / "other")
