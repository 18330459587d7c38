"""Mistakes with `plait data`: each ends in its one line on standard error, and exit status 2."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def build(plait, corpus, tmp_path):
    """Run `plait data build OUT` with some options; returns the exit status and standard error, with
    the folder of the test written as DIR."""

    def run(*options: str, tokenizer: Path = corpus / "tokenizer.model") -> tuple[int, str]:
        words = [word.replace("DIR", str(tmp_path)) for word in options]
        code, _, err = plait("data", "build", tmp_path / "out", "--tokenizer", tokenizer, *words)
        return code, err.replace(str(tmp_path), "DIR")

    (tmp_path / "pairs.jsonl").write_text('{"q": "How?", "a": "So."}\n' * 9)
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n' * 9)
    return run


BUILDS = {
    "a source that is nowhere": (
        ["--corpus", "DIR/none"],
        "DIR/none: no such file or folder; a corpus is 'stdlib', a file or a folder",
    ),
    "a name of the hub without its sign": (
        ["--corpus", "some/name"],
        "some/name: no such file or folder (a dataset of the hub is hub:some/name); "
        "a corpus is 'stdlib', a file or a folder",
    ),
    "lines without the key": (
        ["--corpus", "DIR/pairs.jsonl"],
        "DIR/pairs.jsonl:1: no key 'text' among its keys ('q', 'a'); name the right one with --text-key",
    ),
    "a mask for lines without its keys": (
        ["--corpus", "DIR/pairs.jsonl", "--mask", "prompt"],
        "DIR/pairs.jsonl:1: neither 'prompt' and 'completion' nor 'text' among its keys ('q', 'a'); "
        "name the right ones with --prompt-key and --completion-key",
    ),
    "a mask for plain text": (
        ["--corpus", "DIR/text.jsonl", "--mask", "prompt"],
        "mask = prompt, but no document has a prompt; name the rows' keys with --prompt-key and "
        "--completion-key, or build without a mask",
    ),
    "a compressed file cut off": (
        ["--corpus", "DIR/x.jsonl.zst"],
        "DIR/x.jsonl.zst: cannot be read: it ends inside a zstd frame; is it whole?",
    ),
}


@pytest.mark.parametrize("mistake", BUILDS)
def test_a_wrong_source(mistake, build, tmp_path):
    (tmp_path / "x.jsonl.zst").write_bytes(bytes.fromhex("28b52ffd2004"))
    options, line = BUILDS[mistake]
    assert build(*options) == (2, f"plait: error: {line}\n")
    assert not (tmp_path / "out").exists()


def test_a_wrong_tokenizer(build, tmp_path):
    text = ("--corpus", "DIR/text.jsonl")
    (tmp_path / "t").mkdir()
    line = "DIR/t: no tokenizer.json lies in this folder; name a tokenizer's file or folder"
    assert build(*text, tokenizer=tmp_path / "t") == (2, f"plait: error: {line}\n")
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps({"model": {}}))
    line = (
        "DIR/t: no tokenizer_config.json or special_tokens_map.json here names an eos_token, which closes "
        'documents; add "eos_token" to tokenizer_config.json'
    )
    assert build(*text, tokenizer=tmp_path / "t") == (2, f"plait: error: {line}\n")
    line = "DIR/text.jsonl: not a sentencepiece model; make one with `plait data tokenizer`"
    assert build(*text, tokenizer=tmp_path / "text.jsonl") == (2, f"plait: error: {line}\n")


def test_folders_above_are_made(build, plait, corpus, tmp_path):
    words = ["--corpus", str(tmp_path / "text.jsonl")]
    out = str(tmp_path / "a" / "b" / "t.model")
    assert plait("data", "tokenizer", out, *words, "--vocab-size", 263)[0] == 0
    words += ["--tokenizer", out, "--workers", "1"]
    assert plait("data", "build", tmp_path / "c" / "d", *words)[0] == 0
    assert (tmp_path / "c" / "d" / "manifest.json").is_file()
