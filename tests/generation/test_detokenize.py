"""Tests of streaming text: its parts add up to the decoded text, and characters stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from archdsl.data.tokenizers import byte_level, train_bpe
from archdsl.generation.detokenize import REPLACEMENT, StopStringFilter, StreamingDecoder
from tests.texts import WORDS, document

BYTES = byte_level()
BPE = train_bpe((document(seed) for seed in range(50)), 300)
TEXTS = st.text() | st.lists(st.sampled_from(["€", "né", "a\n", "👩‍🚀", *WORDS])).map(" ".join)


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    pieces = StreamingDecoder(tokenizer, before)
    return [*map(pieces.push, tokens), pieces.finish()]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=TEXTS, before=TEXTS)
def test_no_piece_is_half_a_character_and_together_they_are_the_text(
    tokenizer: Tokenizer, text: str, before: str
) -> None:
    tokens, earlier = (tokenizer.encode(part).ids for part in (text, before))
    found = pieces_of(tokenizer, tokens, earlier)
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(found)
        assert found[-1] == ""  # all characters are complete, so nothing is left for the end


@given(st.lists(st.integers(0, 255) | st.sampled_from(list("é€😀a".encode())), max_size=40))
def test_bytes_that_are_no_text_come_out_as_they_would_all_at_once(tokens: list[int]) -> None:
    assert "".join(pieces_of(BYTES, tokens)) == BYTES.decode(tokens)


def test_a_character_comes_out_with_its_last_byte() -> None:
    assert pieces_of(BYTES, list("a€b".encode())) == ["a", "", "", "€", "b", ""]
    assert pieces_of(BYTES, list("a€".encode())[:-1]) == ["a", "", "", REPLACEMENT]


def llama() -> Tokenizer:
    """Return a tokenizer as SentencePiece models have it: words begin with a space.

    The decoder drops the space at the beginning of a text.
    """
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁cat": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def test_a_continuation_keeps_the_space_that_a_beginning_loses() -> None:
    assert pieces_of(llama(), [256, 257]) == ["the", " cat", ""]
    assert pieces_of(llama(), [257, 256], before=[256]) == [" cat", " the", ""]
    assert pieces_of(llama(), [*"€".encode(), 257], before=[257]) == ["", "", "€", " cat", ""]


def cut(text: str, stops: list[str]) -> str:
    """Return the text before the stop string that is completed first."""
    for end in range(len(text) + 1):
        begun = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begun:
            return text[: min(begun)]
    return text


def words_of_two_letters() -> Tokenizer:
    words = ["".join(word) for n in (1, 2, 3) for word in product("ab", repeat=n)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


CUT = words_of_two_letters()
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.integers(0, 13), max_size=8), STOPS)
def test_a_text_ends_before_the_first_stop_and_nothing_of_the_stop_was_shown(
    tokens: list[int], stops: list[str]
) -> None:
    text = CUT.decode(tokens)
    found, shown = StopStringFilter(StreamingDecoder(CUT), stops), ""
    for token in tokens:
        shown += found.push(token)
        assert cut(text, stops).startswith(shown)
    shown += found.finish()
    assert shown == found.text == cut(text, stops)
    assert (found.stopped_by is None) is (not any(stop in text for stop in stops))


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    found = StopStringFilter(StreamingDecoder(BYTES), ["\n\n", "END"])
    assert [found.push(byte) for byte in b"a\nbE"] == ["a", "", "\nb", ""]
    assert found.finish() == "E"
