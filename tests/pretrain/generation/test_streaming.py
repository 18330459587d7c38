"""Text that comes piece by piece is the text, and never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.tokenizer import load_tokenizer
from plait.pretrain.generation import TextStream


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def pieces(tokenizer, ids, before=()):
    stream = TextStream(tokenizer, before)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_comes_whole():
    assert pieces(Bytes(), "aé€😀b".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_what_is_never_completed_comes_at_the_end():
    cut = "a😀".encode()[:-1]
    assert pieces(Bytes(), cut) == ["a", "", "", "", Bytes().decode(cut)[1:]]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=20))
def test_pieces_of_a_text_are_the_text(text, before):
    given_pieces = pieces(Bytes(), text.encode(), before.encode())
    assert "".join(given_pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in given_pieces)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_pieces_of_garbage_are_what_decoding_it_gives(garbage):
    assert "".join(pieces(Bytes(), garbage)) == Bytes().decode(garbage)


@pytest.mark.parametrize("text", ["state space\n  token é😀 漢字 decay", "😀" * 40, "\ufffd" * 9 + "x"])
def test_a_trained_tokenizer_streams_its_text(corpus, text):
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, before=tokenizer.encode("chunk "))) == text
