"""Texts are mixed in the shares asked for, and a batch depends only on its number and the seed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import archdsl
from archdsl.data.loading import load_data
from archdsl.data.mixture import MixedData, parse_mixture, turns
from archdsl.data.types import DataError
from tests.texts import document, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, first in (("a", 0), ("b", 1000)):
        write_jsonl(folder / f"{name}.jsonl", [document(first + n) for n in range(60)])
    return folder


def mixed(folder: Path, *weights: float, tokenizer: str = "bytes") -> MixedData:
    parts = [(f"{folder}/{name}.jsonl", w) for name, w in zip("ab", weights, strict=True)]
    data = load_data(parts, tokenizer=tokenizer, cache=folder / "cache")
    assert isinstance(data, MixedData)
    return data


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
@settings(deadline=None)
def test_each_text_has_its_share_to_within_one_row_at_every_row(share: list[int]) -> None:
    row_P, before = turns(tuple(share))
    rows = np.arange(len(row_P) + 1)[:, None]
    assert np.array_equal(before[-1], share)
    assert np.abs(before - rows * np.array(share) / sum(share)).max() < 1
    assert np.array_equal(np.diff(before, axis=0).argmax(1), row_P)


def test_rows_of_a_text_come_in_its_own_order(folder: Path) -> None:
    data, context, seed = mixed(folder, 0.75, 0.25), 16, 3
    batches = [data.batch(i, 6, context, seed).tokens_BT for i in range(8)]
    assert torch.equal(torch.cat(batches[2:4]), data.batch(1, 12, context, seed).tokens_BT)
    row_P, _ = turns((3, 1))
    text_B = torch.from_numpy(np.resize(row_P, 48))
    for number, part in enumerate(data.parts):
        own = torch.cat(batches)[text_B == number]
        assert torch.equal(own, part.batch(0, len(own), context, seed).tokens_BT)
    assert (text_B == 0).sum() == 36


def test_held_out_text_has_the_shares_of_training(folder: Path) -> None:
    data, context = mixed(folder, 2, 1), 8
    own = [(len(part.tokens["validation"]) - 1) // context for part in data.parts]
    rows = [tuple(r.tolist()) for b in data.held_out("validation", 4, context) for r in b.tokens_BT]
    count = min(own[0] * 3 // 2, own[1] * 3)
    first = round(count * 2 / 3)
    assert len(rows) == count
    for part, used in zip(data.parts, (rows[:first], rows[first:]), strict=True):
        batches = part.held_out("validation", 4, context, len(used) * context)
        assert used == [tuple(row.tolist()) for b in batches for row in b.tokens_BT]
    assert sum(len(b.tokens_BT) for b in data.held_out("validation", 4, context, 30)) == 3
    of_each = [part.bytes_per_token("test") for part in data.parts]
    assert data.bytes_per_token("test") == pytest.approx((2 * of_each[0] + of_each[1]) / 3)


def test_the_name_loads_the_same_mixture_and_weights_are_part_of_what_it_is(folder: Path) -> None:
    data = mixed(folder, 0.8, 0.2, tokenizer="bpe:300")
    again = archdsl.load_data(data.name, tokenizer="bpe:300", cache=folder / "cache")
    assert data.name == f"{folder}/a.jsonl:0.8 + {folder}/b.jsonl:0.2"
    assert (again.name, again.fingerprint) == (data.name, data.fingerprint)
    assert data.parts[0].tokenizer.to_str() == data.parts[1].tokenizer.to_str()
    assert mixed(folder, 8, 2, tokenizer="bpe:300").fingerprint == data.fingerprint
    assert mixed(folder, 0.7, 0.3, tokenizer="bpe:300").fingerprint != data.fingerprint
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent.batch(1, 5, 16, 0).tokens_BT, data.batch(1, 5, 16, 0).tokens_BT)


def test_what_a_weight_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:3").mkdir()
    (tmp_path / "x + y").mkdir()

    def found(text: str) -> list[tuple[str, float]]:
        return [(source, float(weight)) for source, weight in parse_mixture(text)]

    assert found("x:3") == [("x:3", 1)]
    assert found("x + y") == [("x + y", 1)]
    assert found("a:0.5 + a::text:1") == [("a", 0.5), ("a::text", 1)]
    assert found("hf:5") == [("hf:5", 1)]
    assert found("hf:o/5:2 + a::7:3") == [("hf:o/5", 2), ("a::7", 3)]
    assert found("a::7") == [("a::7", 1)]
    assert found("skill:p-hop,hops=2:4") == [("skill:p-hop,hops=2", 4)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a:1 + b", "'b' has no weight, while others have"),
        ("a:1 + a:2", "'a' is named twice"),
        ("a:0 + b:1", "'a': the weight must be a number above zero, got 0"),
        ([("a", float("nan")), "b"], "'a': the weight must be a number above zero, got nan"),
        (["a", 3], "expected data, or a pair of data and a weight, got 3"),
        ("a + skill:p-hop", "skill:p-hop cannot be mixed with other data"),
        ([], "from 1 to 1,000 data can be mixed, got 0"),
    ],
)
def test_a_wrong_mixture_is_told(given: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(given)


def test_weights_without_a_short_period_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="repeat only after 1,234,568 sequences"):
        mixed(folder, 1234567, 1)
