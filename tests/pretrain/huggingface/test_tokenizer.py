"""tokenizer.json gives sentencepiece's ids: on real code, on noise, on what looks like special tokens."""

import io
import itertools
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from plait.data.corpus import Corpus
from plait.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from plait.errors import UserError
from plait.pretrain.huggingface.tokenizer import convert_tokenizer, merges_of

PIECES = [" ", "  ", "    ", "\n", "\t", "def ", "return", "self.", "▁", "é", "漢", "🙂", "\u0301", "\x00"]
SPECIAL = [END_OF_DOCUMENT, "<unk>", "<0x41>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for text in itertools.islice(Corpus(["stdlib"]), 0, None, 6) if len(text) < 60_000]


@pytest.fixture(scope="module")
def ours(documents, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "code.model"
    return train_tokenizer(documents[::3], path, vocab_size=1500)


@pytest.fixture(scope="module")
def folder(ours) -> Path:
    for name, text in convert_tokenizer(ours.path).files.items():
        (ours.path.parent / name).write_text(text, encoding="utf-8")
    return ours.path.parent


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_every_document_of_a_corpus(ours, theirs, documents):
    assert len(documents) > 80
    for text in documents:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text.replace("▁", " ")


@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_any_text(ours, theirs, data):
    words = [*PIECES, *SPECIAL, *(ours._processor.id_to_piece(i).replace("▁", " ") for i in range(258, 1500))]
    text = data.draw(st.lists(st.sampled_from(words) | st.text(max_size=4), max_size=80).map("".join))
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_all_planes_of_unicode(ours, theirs):
    text = "".join(chr(c) for c in range(0, 0x110000, 29) if not 0xD800 <= c < 0xE000)
    assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("special", SPECIAL)
def test_the_name_of_a_special_token_is_text(ours, theirs, special):
    for text in (special, f"a {special}{special} b", f"{special}\n"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert not {0, 1} & set(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_what_the_specials_are(theirs):
    assert theirs.eos_token_id == 1
    assert theirs.pad_token_id == theirs.unk_token_id == 0
    assert theirs.bos_token is None
    assert theirs.decode([1, *theirs("x")["input_ids"], 1], skip_special_tokens=True) == "x"
    padded = theirs(["a b c d", "x"], padding=True)
    assert padded["input_ids"][1][-1] == 0
    assert padded["attention_mask"][1][-1] == 0


def test_a_long_document_takes_time_in_proportion(theirs, documents):
    text = "".join(documents)
    seconds = []
    for length in (50_000, 400_000):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            theirs(text[:length])
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    # Eight times the text; a quadratic method would take 64 times as long.
    assert seconds[1] < 24 * seconds[0]


def test_one_merge_a_piece_by_sentencepiece_s_own_order():
    scores = {"ab": -1.0, "bc": -2.0, "abc": -3.0, "aa": -4.0, "aaa": -5.0, "xyz": -6.0, "ca": -7.0}
    scores |= dict.fromkeys("abcxyz", -9.0)
    # abc is ab + c and never a + bc, since ab is joined first; xyz cannot be reached at all.
    assert merges_of(scores) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "a"), ("aa", "a"), ("c", "a")]


def test_the_piece_that_two_pairs_make_ambiguous(tmp_path):
    """A vocabulary full of self-overlapping pieces: runs of a and b of every length."""
    texts = ["a" * n + "b" * m + "ab" * k for n in range(1, 12) for m in range(1, 5) for k in range(9)]
    ours = train_tokenizer(texts, tmp_path / "runs.model", vocab_size=290)
    theirs = tokenizers.Tokenizer.from_str(convert_tokenizer(ours.path).files["tokenizer.json"])
    for length in range(1, 13):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            assert theirs.encode(text).ids == ours.encode(text), text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is no BPE model"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it normalises text"),
        ({"add_dummy_prefix": True}, "it adds a space before a text"),
        ({"user_defined_symbols": ["<tool>"]}, "it has user-defined or unused pieces"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tmp_path, options, reason):
    fitting = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the state of the space", "a token and a chunk and a token"] * 20),
        model_writer=model,
        vocab_size=290 if options.get("byte_fallback", True) else 30,
        hard_vocab_limit=False,
        minloglevel=3,
        **(fitting | options),
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UserError, match=reason) as caught:
        convert_tokenizer(path)
    assert str(path) in str(caught.value)
