from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.data.tokenizer import (
    END_OF_DOCUMENT,
    Tokenizer,
    load_tokenizer,
    sentencepiece,
    train_tokenizer,
    training,
)
from plait.data.tokenizer.sentencepiece import SentencePieceTokenizer
from plait.errors import UserError

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\n\t\t\r\n\r \x0b\x0c",
    "a\0b\x01\x7f",
    "\ufeffbom \u200b\u200d\u2028\u2029\x85\xa0",
    "ﬁ Å A\u030a ½ ① full　width",
    "\U0001f469\u200d\U0001f680 \U0010ffff \ue000",
    f"{END_OF_DOCUMENT} <unk> <0x0A> <s> </s>",
    "2047: \u2047, fffd: \ufffd",
    "x" * 5000,
    " " * 300 + "\t" * 40,
]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_does_not(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_ids_and_interface(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 360
    assert tokenizer.end_of_document == 1
    assert tokenizer.decode([tokenizer.end_of_document]) == ""
    again = load_tokenizer(tokenizer.path)
    assert again.fingerprint == tokenizer.fingerprint
    assert len(again.fingerprint) == 64


def test_indentation_and_newlines_are_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("):\n")) == 1
    assert len(tokenizer.encode("\n\n")) == 1


def test_same_corpus_same_model(tmp_path: Path, texts: list[str]) -> None:
    options = {"vocab_size": 330, "sample_bytes": 5000}
    one = train_tokenizer(texts, tmp_path / "one.model", **options)
    two = train_tokenizer(iter(texts), tmp_path / "two.model", **options)
    other = train_tokenizer(texts, tmp_path / "three.model", seed=1, **options)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.model", "three.model", "two.model"]


def test_sample_keeps_to_its_size_and_order(texts: list[str]) -> None:
    sample = training._sample(texts, 5000, seed=0)
    assert 4000 < sum(len(text.encode()) for text in sample) <= 5000
    places = [texts.index(text) for text in sample]
    assert places == sorted(places)
    assert places[-1] > 200


def test_training_blocks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TRAINING_BLOCK", 64)
    text = "line\n" * 50 + "unbroken" * 50
    blocks = list(training._blocks(text))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 64


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["):\n", "    ", "\n\n", "def ", "\u2581", "é", "1", "x" * 7, "\U0001f600"])))
def test_long_texts_are_cut_only_where_ids_stay(tokenizer: SentencePieceTokenizer, words: list[str]) -> None:
    text = "".join(words) + "def read_token(x):\n    return [y + 1, y + 2]\n" * 4
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece, "ENCODING_BLOCK", 16)
        assert tokenizer.encode_batch(["", text, "x"]) == [[], whole, tokenizer.encode("x")]
        parts = tokenizer._parts(text)
    assert len(parts) > 3


def test_a_text_without_a_place_to_cut_stays_whole(tokenizer: SentencePieceTokenizer, monkeypatch) -> None:
    monkeypatch.setattr(sentencepiece, "ENCODING_BLOCK", 8)
    assert tokenizer._parts(" " * 50) == [" " * 50]
    # What a normaliser does to a text's ends, it would do at every cut.
    monkeypatch.setattr(tokenizer, "_joined", None)
    assert tokenizer._parts("a\nb\nc\nd\ne\n") == ["a\nb\nc\nd\ne\n"]


def test_mistakes(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"choose at most \d+"):
        train_tokenizer(texts[:2], tmp_path / "x.model", vocab_size=9000)
    with pytest.raises(UserError, match=r"choose at least \d+"):
        train_tokenizer(texts, tmp_path / "x.model", vocab_size=260)
    with pytest.raises(UserError, match="is a folder"):
        train_tokenizer(texts, tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "junk.model")
    with pytest.raises(UserError, match="lies under a file"):
        train_tokenizer(texts, tmp_path / "junk.model" / "deep" / "x.model", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["junk.model"]
