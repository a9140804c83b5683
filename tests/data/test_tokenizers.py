"""Tokenizers decode to the original text, and no text contains the end of a document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from archdsl.data.documents import SPLITS
from archdsl.data.loading import load_data
from archdsl.data.tokenizers import (
    byte_level,
    encode,
    read_tokenizer,
    tokenizer_key,
    train_bpe,
)
from archdsl.data.types import DataError
from tests.texts import WORDS, document, documents, load_text, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


@given(st.text())
def test_byte_tokens_are_the_bytes_in_both_encoders(text: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.encode(text).ids == list(text.encode())
    assert [tokens.tolist() for tokens, _ in encode(tokenizer, [text])] == [list(text.encode())]
    assert tokenizer.decode(list(text.encode())) == text


BPE = train_bpe((document(seed) for seed in range(50)), 300)


@given(st.text() | st.lists(st.sampled_from([*WORDS, "<|endoftext|>"])).map(" ".join))
def test_a_bpe_decodes_any_text_and_gives_no_end_of_document(text: str) -> None:
    [(tokens, length)] = encode(BPE, [text])
    assert BPE.decode(tokens.tolist()) == text
    assert BPE.token_to_id("<|endoftext|>") not in tokens
    assert length == len(text.encode())


def test_a_bpe_is_trained_on_the_training_split_only_and_is_reproducible(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent / "1", "bpe:300")
    again = load_text(corpus, corpus.parent / "2", "bpe:300")
    train = documents(load_text(corpus, corpus.parent).tokens["train"])
    assert data.tokenizer.to_str() == again.tokenizer.to_str() == train_bpe(train, 300).to_str()
    assert data.fingerprint == again.fingerprint
    assert data.vocab_size == 300


def test_a_saved_tokenizer_gives_the_same_tokens(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent, "bpe:300")
    path = corpus.parent / "tokenizer.json"
    data.save_tokenizer(path)
    again = load_text(corpus, corpus.parent, str(path))
    assert all(np.array_equal(data.tokens[split], again.tokens[split]) for split in SPLITS)
    assert read_tokenizer(path).to_str() == data.tokenizer.to_str()


def test_a_foreign_tokenizer_gets_an_end_of_document_and_a_large_one_wider_integers(
    corpus: Path,
) -> None:
    vocab = {"?": 0, **{word: 70_000 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(4)
    path = corpus.parent / "words.json"
    tokenizer.save(str(path))
    data = load_text(corpus, corpus.parent, str(path))
    found = list(data.tokens["validation"])
    assert data.vocab_size > max(found) >= 70_000
    assert len(found) > 3 * 20  # three documents, none of them truncated
    assert data.tokenizer.token_to_id("<|endoftext|>") == found[0] == found[-1]


def test_text_that_looks_like_an_end_of_document_is_ordinary_text(corpus: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "[SEP]": 2}, unk_token="?"))
    tokenizer.add_special_tokens(["[SEP]"])
    path = corpus.parent / "words.json"
    tokenizer.save(str(path))
    assert load_text(corpus, corpus.parent, str(path)).tokens["train"][0] == 2


def test_the_size_of_a_bpe_may_be_written_as_all_sizes_are() -> None:
    assert tokenizer_key("bpe:8k") == tokenizer_key("bpe:8000") == "bpe:8000"
    assert tokenizer_key("bpe:1KiB") == "bpe:1024"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("byte", "tokenizer 'byte': no such file; expected 'bytes', 'bpe:SIZE'"),
        ("bpe:", "tokenizer 'bpe:': no such file; expected 'bytes', 'bpe:SIZE'"),
        ("bpe:256", "the size must be from 257 to 1000000"),
        ("bpe:999999999", "the size must be from 257 to 1000000"),
        (__file__, "is not a tokenizer.json"),
    ],
)
def test_the_error_for_a_wrong_tokenizer_says_what_is_right(
    name: str, message: str, corpus: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_data(str(corpus), tokenizer=name, cache=corpus.parent)


@pytest.mark.slow
def test_a_bpe_of_the_embedded_corpus_compresses_unseen_speeches(tmp_path: Path) -> None:
    data = load_text(None, tmp_path, "bpe:4096")
    assert data.vocab_size == 4096
    assert 4.3 < data.bytes_per_token("validation") < 4.5
