"""The Hugging Face kind of tokenizer, and both kinds in the folders of corpora and runs."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from plait.data.build import build
from plait.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from plait.data.tokenizer.huggingface import HuggingFaceTokenizer
from plait.data.verification import verify
from plait.errors import UserError
from plait.pretrain.config_file import parse_config
from plait.pretrain.run_folder import RunFolder

END = "<|endoftext|>"


@pytest.fixture
def copy(hf_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_folder, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**tree, **changes}.items() if v is not None}))


def test_ids_are_those_of_transformers(hf_folder: Path, texts: list[str]) -> None:
    ours, theirs = load_tokenizer(hf_folder), AutoTokenizer.from_pretrained(hf_folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert (ours.kind, ours.vocab_size, ours.end_of_document) == ("huggingface", 400, theirs.eos_token_id)
    for text in [*texts[:40], "", " ", "\n\n", "é \U0001f600 \x00"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_special_tokens_in_a_text_are_text(hf_folder: Path, copy: Path) -> None:
    edit(copy / "tokenizer.json", added_tokens=[{**t, "special": False} for t in added(copy)])
    for tokenizer in map(load_tokenizer, (hf_folder, copy)):
        for text in (END, f"a{END}b <|pad|>{END}{END}", f" {END}\n"):
            ids = tokenizer.encode(text)
            assert not {0, 1} & set(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.end_of_document]) == ""


def added(folder: Path) -> list[dict]:
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def test_the_first_id_that_stands_for_another_piece(copy: Path, hf_tokenizer: Tokenizer) -> None:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    edit(copy / "tokenizer.json", added_tokens=[*added(copy), {**token, "id": 400, "content": "<|new|>"}])
    longer = load_tokenizer(copy)
    assert (longer.vocab_size, longer.piece(400)) == (401, "<|new|>")
    assert hf_tokenizer.first_difference(longer) is None
    assert longer.first_difference(hf_tokenizer) == 400
    tree = json.loads((copy / "tokenizer.json").read_text())
    words = {number: piece for piece, number in tree["model"]["vocab"].items()}
    tree["model"]["vocab"] |= {words[7]: 9, words[9]: 7}
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    assert hf_tokenizer.first_difference(load_tokenizer(copy)) == 7


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(hf_tokenizer: Tokenizer, text: str) -> None:
    assert hf_tokenizer.decode(hf_tokenizer.encode(text)) == text


def test_templates_padding_and_truncation_play_no_part(copy: Path, hf_tokenizer: Tokenizer) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"}
    edit(copy / "tokenizer.json", post_processor=template, truncation=cut, padding=pad)
    text = "read tokens and merge them"
    assert load_tokenizer(copy).encode(text) == hf_tokenizer.encode(text)


def test_eos_from_either_file_and_as_an_object(copy: Path, hf_tokenizer: Tokenizer) -> None:
    edit(copy / "tokenizer_config.json", eos_token=None)
    (copy / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert load_tokenizer(copy).end_of_document == 1
    edit(copy / "tokenizer_config.json", eos_token={"content": END, "lstrip": False})
    assert load_tokenizer(copy).end_of_document == hf_tokenizer.end_of_document


def test_fingerprint_is_of_the_files_bytes(hf_folder: Path, tmp_path: Path) -> None:
    files = [hf_folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    tokenizer = load_tokenizer(hf_folder)
    expected = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert tokenizer.fingerprint == expected
    tokenizer.save_into(tmp_path)
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer"
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.fingerprint, again.encode("a b")) == (tokenizer.fingerprint, tokenizer.encode("a b"))
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("a b")["input_ids"] == tokenizer.encode(
        "a b"
    )


def test_sentencepiece_through_the_same_door(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert (tokenizer.kind, find_tokenizer(tmp_path)) == ("sentencepiece", None)
    tokenizer.save_into(tmp_path)
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.fingerprint, again.encode("a b")) == (tokenizer.fingerprint, tokenizer.encode("a b"))


def test_corpus_and_run_carry_the_folder(
    texts: list[str], hf_tokenizer: Tokenizer, tokenizer: Tokenizer, tmp_path: Path, tiny: dict
) -> None:
    corpus = tmp_path / "c"
    manifest = build(corpus, texts, hf_tokenizer)
    assert sorted(path.name for path in (corpus / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert verify(corpus) == manifest
    build(corpus, texts, load_tokenizer(corpus))
    with pytest.raises(UserError, match="was built with tokenizer"):
        build(corpus, texts, tokenizer)
    tiny["data"] = {"blend": {str(corpus / "train"): 1}, "seq_len": 50}
    tiny["model"]["vocab_size"] = 400
    folder = RunFolder(tmp_path / "run")
    folder.prepare(parse_config(tiny, "test"))
    here = folder.tokenizer()
    assert here is not None
    assert (here.kind, here.fingerprint) == ("huggingface", hf_tokenizer.fingerprint)
    assert yaml.safe_load(folder.config_file.read_text())["model"]["vocab_size"] == 400
    (corpus / "tokenizer" / "tokenizer.json").write_text((corpus / "manifest.json").read_text())
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        verify(corpus)


def test_mistakes(copy: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            load_tokenizer(copy)
        assert str(copy) in str(error.value)

    edit(copy / "tokenizer_config.json", eos_token="<eos>")
    refused("'<eos>' is no token of tokenizer.json")
    # A word of the vocabulary that texts do spell cannot close documents.
    edit(copy / "tokenizer_config.json", eos_token="a")
    refused("could end a document by spelling it")
    edit(copy / "tokenizer_config.json", eos_token=None)
    refused('add "eos_token" to tokenizer_config.json')
    (copy / "tokenizer_config.json").write_text("[]")
    refused("holds no object")
    (copy / "tokenizer_config.json").write_text('{"eos_token')
    refused("not JSON")
    edit(copy / "tokenizer.json", model={"type": "Nothing"})
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    refused(r"tokenizer.json: not a tokenizer that can be read")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer.json lies in this folder"):
        load_tokenizer(tmp_path / "empty")
