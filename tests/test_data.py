"""Data: no document is in two splits, a batch depends on its number alone, the cache mends."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import archdsl
from archdsl.batch import IGNORE, Batch, Data, DataError, HeldOut
from archdsl.data import TextData, load_data
from archdsl.documents import SPLITS, divide
from archdsl.tokenizer import byte_level, encode, read_tokenizer, train_bpe

END = 256
WORDS = ["loop", "think", "depth", "token", "na\u00efve", "\U0001f600", "\n", "</s>"]


def document(seed: int, words: int = 30) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + f" {seed}"


def documents(tokens: Any) -> list[str]:
    """What a stream of byte tokens was made of."""
    # the byte 255 is in no UTF-8
    *ended, rest = np.where(tokens == END, 255, tokens).astype(np.uint8).tobytes().split(b"\xff")
    assert not rest
    return [text.decode() for text in ended[1:]]


def text_of(data: TextData) -> str:
    return "".join(text for split in SPLITS for text in documents(data.tokens[split]))


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({column: text, "number": i}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def load_text(source: Path | str | None, cache: Path, tokenizer: str = "bytes") -> TextData:
    data = load_data(None if source is None else str(source), tokenizer=tokenizer, cache=cache)
    assert isinstance(data, TextData)
    return data


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sotu(shared: Path) -> TextData:
    return load_text(None, shared)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [document(seed) for seed in range(60)])


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.targets_BT, b.targets_BT)


# which document is where


def test_the_embedded_corpus_is_split_by_year(sotu: TextData) -> None:
    path = Path(archdsl.__file__).parent / "corpus" / "sotu.jsonl.xz"
    speeches = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
    remainders = {"validation": {9}, "test": {19}, "train": set(range(20)) - {9, 19}}
    for split, count in zip(SPLITS, (210, 11, 12), strict=True):
        found = documents(sotu.tokens[split])
        assert len(found) == count
        assert found == [s["text"] for s in speeches if s["year"] % 20 in remainders[split]]
    assert sum(sotu.text_bytes.values()) == sum(len(s["text"].encode()) for s in speeches)


@given(st.lists(st.integers(0, 40)), st.sampled_from([2, 3]))
def test_equal_documents_are_never_in_two_splits(more: list[int], count: int) -> None:
    texts = [document(seed, 3) for seed in [*range(20), *more]]
    divided = divide(lambda: iter(texts), SPLITS[1:count])
    parts = [list(divided[split]()) for split in SPLITS[:count]]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert sum(len(set(part)) for part in parts) == len(set(texts))
    assert all(parts)


def test_a_twentieth_of_the_documents_is_held_out_whatever_their_order() -> None:
    texts = [document(seed) for seed in range(100)]
    forth = divide(lambda: iter(texts), ["validation", "test"])
    back = divide(lambda: reversed(texts), ["validation", "test"])
    assert [len(list(forth[split]())) for split in SPLITS] == [90, 5, 5]
    assert all(set(forth[split]()) == set(back[split]()) for split in SPLITS)


def test_one_document_is_cut_in_three(tmp_path: Path) -> None:
    text = document(0, 400)
    (tmp_path / "novel.txt").write_text(text)
    data = load_text(tmp_path / "novel.txt", tmp_path)
    parts = [documents(data.tokens[split]) for split in SPLITS]
    assert text_of(data) == text
    assert [len(part[0]) * 20 // len(text) for part in parts] == [18, 0, 0]
    assert len(parts[1][0]) == len(parts[2][0]) == len(text) // 20


def test_splits_that_files_tell_are_kept(tmp_path: Path) -> None:
    for name, seed in (("train-00-of-01.jsonl", 1), ("valid.jsonl", 2), ("test.jsonl", 3)):
        write_jsonl(tmp_path / "set" / name, [document(seed)])
    data = load_text(tmp_path / "set", tmp_path / "cache")
    assert [documents(data.tokens[split]) for split in SPLITS] == [[document(s)] for s in (1, 2, 3)]


def test_a_lone_file_called_test_is_divided_like_any_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", [document(seed) for seed in range(40)])
    data = load_text(tmp_path / "test.jsonl", tmp_path / "cache")
    assert [len(documents(data.tokens[split])) for split in SPLITS] == [36, 2, 2]


def test_only_the_missing_split_is_taken_from_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [document(seed) for seed in range(40)])
    write_jsonl(tmp_path / "set" / "dev.jsonl", [document(99)])
    data = load_text(tmp_path / "set", tmp_path / "cache")
    assert [len(documents(data.tokens[split])) for split in SPLITS] == [38, 1, 2]
    assert documents(data.tokens["validation"]) == [document(99)]


# reading


def parquet(path: Path, text: str) -> None:
    datasets.Dataset.from_dict({"text": [text]}).to_parquet(path)


WRITERS: dict[str, Callable[[Path, str], object]] = {
    "a.txt": lambda path, text: path.write_text(text),
    "a.txt.gz": lambda path, text: path.write_bytes(gzip.compress(text.encode())),
    "a.jsonl": lambda path, text: path.write_text(json.dumps({"text": text}) + "\n"),
    "a.jsonl.xz": lambda path, text: path.write_bytes(
        lzma.compress(json.dumps({"text": text}).encode())
    ),
    "a.json": lambda path, text: path.write_text(json.dumps([{"story": text, "year": 1}])),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_text(name: str, tmp_path: Path) -> None:
    text = document(0, 100)
    WRITERS[name](tmp_path / name, text)
    data = load_text(tmp_path / name, tmp_path / "cache")
    assert text_of(data) == text


def test_empty_rows_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": document(seed)} for seed in range(20)] + [{"text": ""}, {"text": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_text(path, tmp_path)
    assert sum(len(documents(data.tokens[split])) for split in SPLITS) == 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "no file or folder '.*'; expected nothing .the embedded corpus., a file"),
        ({"": {}}, "no .txt, .jsonl, .json, .parquet file in the folder"),
        ({"/a.pkl": b"x"}, "no .txt, .jsonl, .json, .parquet file in the folder"),
        ({"/a.txt": b"x", "/b.jsonl": b"{}"}, "mixes json and text files"),
        ({"/a.txt": b"\xff\xfe"}, "a.txt is not readable as text: .*utf-8"),
        ({"/a.jsonl": b'{"text": '}, "a.jsonl is not readable as json"),
        ({"/a.json": b'[{"a": "x", "b": "y"}]'}, "column 'text' or a single one .*; found a, b"),
        ({"/a.json": b'[{"text": 3}]'}, "column 'text' or a single one of strings; found text"),
        ({"/a.txt": b"short"}, "too little text, nothing is left for validation"),
        ({"/a.parquet": b"PAR1"}, "a.parquet is not readable as parquet"),
    ],
)
def test_unreadable_text_is_refused_in_one_line(
    content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    for name, what in content.items():
        folder.mkdir(exist_ok=True)
        if what:
            Path(f"{folder}{name}").write_bytes(what)
    with pytest.raises(DataError, match=said) as error:
        load_data(str(folder), cache=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "tokens").glob("*.json"))


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not end in \.txt"):
        load_data(__file__)


def test_without_a_network_a_hub_dataset_says_what_to_do(tmp_path: Path) -> None:
    said = "'hf:wikitext/wikitext-103-raw-v1' could not be fetched: .* download the text and pass"
    with pytest.raises(DataError, match=said):
        load_data("hf:wikitext/wikitext-103-raw-v1", cache=tmp_path)


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c/d", "hf:a//b"])
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected hf:DATASET"):
        load_data(name)


@pytest.mark.parametrize(
    ("name", "found_at"),
    [
        ("hf:one", ("one", None)),
        ("hf:one/two", ("one", "two")),
        ("hf:one/two", ("one/two", None)),
        ("hf:one/two/three", ("one/two", "three")),
    ],
)
def test_a_hub_dataset_keeps_its_splits(
    name: str, found_at: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(path: str, config: str | None, cache_dir: str) -> datasets.DatasetDict:
        if (path, config) != found_at:
            raise datasets.exceptions.DatasetNotFoundError(path)
        texts = {"train": first, "validation": document(2), "test": document(3)}
        rows = {name: datasets.Dataset.from_dict({"text": [t]}) for name, t in texts.items()}
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    first, held = document(0), [[document(2)], [document(3)]]
    for text in (first, document(1)):
        data = load_text(name, tmp_path)
        assert [documents(data.tokens[split]) for split in SPLITS] == [[text], *held]
        first = document(1)  # the dataset has changed


def test_a_local_folder_is_not_taken_for_a_hub_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "wikitext" / "a.jsonl", [document(0)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a local file or folder 'wikitext' is in the way"):
        load_data("hf:wikitext", cache=tmp_path)


# tokenizers


@given(st.text())
def test_byte_tokens_are_the_bytes_in_both_encoders(text: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.encode(text).ids == list(text.encode())
    assert [tokens.tolist() for tokens, _ in encode(tokenizer, [text])] == [list(text.encode())]
    assert tokenizer.decode(list(text.encode())) == text


BPE = train_bpe((document(seed) for seed in range(50)), 300)


@given(st.text() | st.lists(st.sampled_from([*WORDS, "<|endoftext|>"])).map(" ".join))
def test_a_bpe_gives_back_any_text_and_never_ends_it_early(text: str) -> None:
    [(tokens, length)] = encode(BPE, [text])
    assert BPE.decode(tokens.tolist()) == text
    assert BPE.token_to_id("<|endoftext|>") not in tokens
    assert length == len(text.encode())


def test_a_bpe_is_trained_on_the_training_split_only_and_always_the_same(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent / "1", "bpe:300")
    again = load_text(corpus, corpus.parent / "2", "bpe:300")
    train = documents(load_text(corpus, corpus.parent).tokens["train"])
    assert data.tokenizer.to_str() == again.tokenizer.to_str() == train_bpe(train, 300).to_str()
    assert data.fingerprint == again.fingerprint
    assert data.vocab_size == 300


def test_a_saved_tokenizer_reads_the_same_text_into_the_same_tokens(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent, "bpe:300")
    path = corpus.parent / "tokenizer.json"
    data.save_tokenizer(path)
    again = load_text(corpus, corpus.parent, str(path))
    assert all(np.array_equal(data.tokens[split], again.tokens[split]) for split in SPLITS)
    assert read_tokenizer(path).to_str() == data.tokenizer.to_str()


def test_a_foreign_tokenizer_is_given_an_end_and_a_large_one_wider_tokens(corpus: Path) -> None:
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


def test_a_word_that_looks_like_an_end_is_a_word(corpus: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "[SEP]": 2}, unk_token="?"))
    tokenizer.add_special_tokens(["[SEP]"])
    path = corpus.parent / "words.json"
    tokenizer.save(str(path))
    assert load_text(corpus, corpus.parent, str(path)).tokens["train"][0] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("byte", "tokenizer 'byte': no such file; expected 'bytes', 'bpe:SIZE'"),
        ("bpe:", "tokenizer 'bpe:': no such file; expected 'bytes', 'bpe:SIZE'"),
        ("bpe:256", "the size must be from 257 to 1000000"),
        ("bpe:999999999", "the size must be from 257 to 1000000"),
        (__file__, "is not a tokenizer.json"),
    ],
)
def test_a_wrong_tokenizer_says_what_is_right(name: str, said: str, corpus: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_data(str(corpus), tokenizer=name, cache=corpus.parent)


# batches

SOURCES = [None, "skill:p-hop", "skill:arithmetic"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_is_a_pure_function_of_its_number_and_the_seed(
    source: str | None, shared: Path
) -> None:
    data, other = load_data(source, cache=shared), load_data(source, cache=shared)
    data.batch(3, 4, 32, seed=1)
    first = data.batch(7, 4, 32, seed=0)
    assert equal(first, other.batch(7, 4, 32, seed=0))
    assert not equal(first, data.batch(8, 4, 32, seed=0))
    assert not equal(first, data.batch(7, 4, 32, seed=1))
    assert first.tokens_BT.dtype == first.targets_BT.dtype == torch.int64
    assert first.tokens_BT.shape == first.targets_BT.shape == (4, 32)


def test_text_is_read_once_an_epoch_in_an_order_of_its_own(corpus: Path) -> None:
    whole, context = load_text(corpus, corpus.parent), 16
    # the last window ends with the last token
    data = replace(whole, tokens={"train": whole.tokens["train"][: 50 * context + 1]})
    windows = (len(data.tokens["train"]) - 1) // context
    epoch = [data.batch(i, windows, context, seed=0).tokens_BT for i in range(2)]
    inputs = torch.from_numpy(data.tokens["train"][: windows * context].astype(np.int64))
    for tokens_BT in epoch:
        assert sorted(tokens_BT.tolist()) == sorted(inputs.view(windows, context).tolist())
    assert windows == 50
    assert not torch.equal(*epoch)


def test_a_larger_batch_is_the_small_ones_in_a_row(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent)
    small = torch.cat([data.batch(i, 4, 16, 0).tokens_BT for i in (6, 7, 8)])
    assert torch.equal(data.batch(2, 12, 16, 0).tokens_BT, small)


@given(st.integers(1, 700), st.integers(1, 5))
def test_held_out_text_asks_for_each_token_once(context: int, batch_size: int) -> None:
    stream = np.array([END, *b"some text of seventy letters or so, to be cut into windows", END])
    data = TextData("t", byte_level(), "", {"test": stream.astype(np.uint16)}, {"test": 58})
    batches = list(data.held_out("test", batch_size, context))
    targets = torch.cat([batch.targets_BT.flatten() for batch in batches])
    inputs = torch.cat([batch.tokens_BT.flatten() for batch in batches])
    asked = targets != IGNORE
    assert targets[asked].tolist() == stream[1:].tolist()
    assert inputs[asked].tolist() == stream[:-1].tolist()
    assert len(stream) - 1 == 58 / data.bytes_per_token("test")


def test_a_limit_spreads_windows_over_the_whole_split(sotu: TextData) -> None:
    def starts(limit: int | None) -> list[list[int]]:
        batches = sotu.held_out("validation", 16, 64, limit)
        return [row for batch in batches for row in batch.tokens_BT.tolist()]

    everything, some = starts(None), starts(6400)
    places = [everything.index(row) for row in some]
    assert len(some) == 100
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] > 0.98 * len(everything)
    assert some == starts(6400)
    assert len(starts(1)) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_a_limit_below_one_is_refused(source: str | None, shared: Path) -> None:
    with pytest.raises(DataError, match="limit_tokens must be at least 1, got 0"):
        list(load_data(source, cache=shared).held_out("test", 4, 64, 0))


def test_a_context_longer_than_the_text_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match="too few for a context of 100000"):
        load_data(str(corpus), cache=corpus.parent).batch(0, 1, 100_000, 0)


def sequences(batches: Iterator[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in batch.tokens_BT.tolist()}


def test_training_and_held_out_streams_of_a_skill_differ() -> None:
    data = load_data("skill:p-hop")
    train = sequences(data.batch(i, 64, 32, seed) for i in range(16) for seed in range(2))
    held_out: list[HeldOut] = ["validation", "test"]
    streams = [train, *(sequences(data.held_out(split, 50, 32)) for split in held_out)]
    assert [len(stream) for stream in streams] == [2048, 1024, 1024]
    assert len(set.union(*streams)) == 4096


def test_held_out_sequences_do_not_depend_on_the_batch_size() -> None:
    data: Data = load_data("skill:p-hop")
    assert sequences(data.held_out("test", 7, 32)) == sequences(data.held_out("test", 512, 64))
    assert len(sequences(data.held_out("test", 7, 32, 3200))) == 100


def test_a_skill_needs_room_and_has_a_name_of_all_its_options() -> None:
    data = load_data("skill:p-hop,hops=2")
    assert data.name == "skill:p-hop,length=32,hops=2,alphabet=4"
    assert data.fingerprint != load_data("skill:p-hop").fingerprint
    assert (data.chance, data.vocab_size, data.bytes_per_token("test")) == (0.25, 4, None)
    with pytest.raises(DataError, match="needs a context of 32, got 31"):
        data.batch(0, 1, 31, 0)


# the cache


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, zero, Path.unlink])
def test_a_damaged_cache_is_made_again(damage: Callable[[Path], None], corpus: Path) -> None:
    cache = corpus.parent / "cache"
    whole = load_text(corpus, cache)
    files = sorted((cache / "tokens").iterdir())
    assert len(files) == 5
    for file in files:
        before = file.read_bytes()
        damage(file)
        mended = load_text(corpus, cache)
        assert mended.fingerprint == whole.fingerprint
        assert file.read_bytes() == before
        assert documents(mended.tokens["train"]) == documents(whole.tokens["train"])
    assert sorted((cache / "tokens").iterdir()) == files


def test_a_cache_is_used_and_changed_text_is_not_taken_from_it(corpus: Path) -> None:
    cache = corpus.parent / "cache"
    before = load_text(corpus, cache)
    shutil.rmtree(cache / "datasets")
    assert load_text(corpus, cache).fingerprint == before.fingerprint
    assert not (cache / "datasets").exists()
    assert load_text(corpus, cache, "bpe:300").vocab_size == 300
    times = corpus.stat()
    write_jsonl(corpus, [document(seed) for seed in range(61)])
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_text(corpus, cache)
    assert after.fingerprint != before.fingerprint
    assert document(60) in text_of(after)


def test_an_interrupted_build_leaves_no_half_written_file(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        yield np.array([1, 2, 3]), 3
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.data.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_data(str(corpus), cache=corpus.parent / "cache")
    assert not list((corpus.parent / "cache" / "tokens").iterdir())


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [document(i, 20_000) for i in range(60)])
    code = (
        "import sys, pathlib; from archdsl.data import load_data;"
        "load_data(sys.argv[1], cache=pathlib.Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "cache")])
    while process.poll() is None and not list((tmp_path / "cache").glob("tokens/*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() < 0, "it was done before it could be killed"
    data = load_text(path, tmp_path / "cache")
    assert sum(len(documents(data.tokens[split])) for split in SPLITS) == 60


def test_workers_may_build_the_same_cache_at_once(corpus: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_text(corpus, corpus.parent / "cache"), range(4)))
    assert len({data.fingerprint for data in loaded}) == 1
    assert len({data.batch(5, 8, 32, 0).tokens_BT.sum().item() for data in loaded}) == 1


def test_a_cache_that_cannot_be_written_says_how_to_move_it(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"\$ARCHDSL_CACHE names another place"):
        load_data(str(corpus), cache=corpus)


def test_the_cache_is_where_the_environment_says(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus.parent / "xdg"))
    load_data(str(corpus))
    assert (corpus.parent / "xdg/archdsl/tokens").is_dir()
    monkeypatch.setenv("ARCHDSL_CACHE", str(corpus.parent / "own"))
    load_data(str(corpus))
    assert (corpus.parent / "own/tokens").is_dir()


def test_loading_is_silent_and_leaves_the_bars_of_datasets_as_they_were(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    load_data(str(corpus), cache=corpus.parent)
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()


def test_a_cached_corpus_loads_without_the_libraries_that_made_it(
    sotu: TextData, shared: Path
) -> None:
    code = (
        "import sys, pathlib; from archdsl.data import load_data;"
        "assert 'tokenizers' not in sys.modules;"
        "load_data(cache=pathlib.Path(sys.argv[1])); assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(shared)], check=True)


@pytest.mark.slow
def test_a_bpe_of_the_embedded_corpus_packs_speeches_it_has_not_seen(shared: Path) -> None:
    data = load_text(None, shared, "bpe:4096")
    assert data.vocab_size == 4096
    assert 4.3 < data.bytes_per_token("validation") < 4.5
