"""A batch depends only on its number and the seed, and held-out text is used exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archdsl.data.loading import TextData, load_data
from archdsl.data.tokenizers import byte_level
from archdsl.data.types import Batch, Data, DataError, HeldOut
from tests.texts import END, load_text, write_corpus


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sotu(shared: Path) -> TextData:
    return load_text(None, shared)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.targets_BT, b.targets_BT)


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


def test_each_epoch_has_every_window_once_in_its_own_order(corpus: Path) -> None:
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


def test_a_large_batch_is_several_small_ones_joined(corpus: Path) -> None:
    data = load_text(corpus, corpus.parent)
    small = torch.cat([data.batch(i, 4, 16, 0).tokens_BT for i in (6, 7, 8)])
    assert torch.equal(data.batch(2, 12, 16, 0).tokens_BT, small)


@given(st.integers(1, 700), st.integers(1, 5))
def test_each_token_of_held_out_text_is_a_target_once(context: int, batch_size: int) -> None:
    stream = np.array([END, *b"some text of seventy letters or so, to be cut into windows", END])
    data = TextData("t", byte_level(), "", {"test": stream.astype(np.uint16)}, {"test": 58})
    batches = list(data.held_out("test", batch_size, context))
    targets = torch.cat([batch.targets_BT.flatten() for batch in batches])
    inputs = torch.cat([batch.tokens_BT.flatten() for batch in batches])
    assert targets.tolist() == stream[1:].tolist()
    assert inputs.tolist() == stream[:-1].tolist()
    assert len(stream) - 1 == 58 / data.bytes_per_token("test")


def test_a_limited_number_of_windows_is_spread_over_the_split(sotu: TextData) -> None:
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


def test_training_and_held_out_sequences_of_a_skill_differ() -> None:
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


def test_a_skill_needs_a_long_enough_context_and_its_name_has_all_options() -> None:
    data = load_data("skill:p-hop,hops=2")
    assert data.name == "skill:p-hop,length=32,hops=2,alphabet=4"
    assert data.fingerprint != load_data("skill:p-hop").fingerprint
    assert (data.chance, data.vocab_size, data.bytes_per_token("test")) == (0.25, 4, None)
    with pytest.raises(DataError, match="needs a context of 32, got 31"):
        data.batch(0, 1, 31, 0)


def test_without_a_home_folder_the_cache_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "ARCHDSL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # nobody has this number
    with pytest.raises(DataError, match=r"no home folder .* set \$ARCHDSL_CACHE"):
        load_data("skill.txt")
    with pytest.raises(DataError, match=r"no file or folder .~nobody-knows/text.txt"):
        load_data("~nobody-knows/text.txt", cache=tmp_path)
