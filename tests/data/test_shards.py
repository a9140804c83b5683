"""Shards hold the tokens and documents that `load_data` gives, however they were written."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archdsl.data.documents import SPLITS
from archdsl.data.loading import load_data
from archdsl.data.parts import cut
from archdsl.data.shards import ShardedData
from archdsl.data.text_data import TextData
from archdsl.data.tokenization import Plan, tokenize
from archdsl.data.tokenizers import end_of_document
from archdsl.data.types import DataError
from archdsl.files import WriteError, write_text
from tests.texts import document, load_text, write_corpus, write_jsonl


def whole(data: TextData) -> dict[str, list[int]]:
    return {split: data.tokens[split][np.arange(len(data.tokens[split]))].tolist()
            for split in SPLITS}  # fmt: skip


def shards_of(folder: Path) -> ShardedData:
    data = load_data(folder)
    assert isinstance(data, ShardedData)
    return data


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, pieces and chunks are so small that a short text has many of them."""
    monkeypatch.setattr("archdsl.data.tokenization.SMALLEST_PIECE", 1500)
    monkeypatch.setattr("archdsl.data.tokenizers.CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr("archdsl.data.parts.BLOCK", 40)


WORDS = [
    " loop", " it's", "\n",
    "think.\nloops", "loops think", " \n\n", "s\r\nthink", "\u00e9\n", "\u2028 ",
    " 12", "\u3000\n", "\u601d\u8003\u3002\n", "\xa0 think", "\x1c loop", "  ", "\U0001f600 ",
]  # fmt: skip


def text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(WORDS, rng.integers(0, 200)))


def test_a_text_is_cut_into_many_parts(small: None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Prose. More of it!\n" * 500)
    parts = cut({"train": [tmp_path / "a.txt"]}, 500, True)
    assert [part.bytes for part in parts] == pytest.approx([500] * 19, abs=60)


@given(
    st.integers(0, 99),
    st.sampled_from([1, 4, 45]),
    st.sampled_from(["jsonl", "txt", "both", "gz"]),
    st.sampled_from(["bytes", "bpe:300"]),
    st.booleans(),
    st.integers(300, 20_000),
)
@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_are_what_load_data_gives(
    tmp_path: Path,
    small: None,
    seed: int,
    count: int,
    kind: str,
    choice: str,
    held_out: bool,
    most: int,
) -> None:
    rng = np.random.default_rng(seed)
    texts = [text(rng) for _ in range(count)]
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))
    texts.append(document(0, 60))
    if kind != "txt":
        write_jsonl(tmp_path / "set" / "train.jsonl", texts)
    if kind in ("txt", "both"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "train-b.txt").write_bytes("\n".join(texts).encode())
    if kind == "gz":
        subprocess.run(["gzip", tmp_path / "set" / "train.jsonl"], check=True)
    if held_out:
        write_jsonl(tmp_path / "set" / "valid.jsonl", ["held out", document(99, 200)])
    expected = load_text(tmp_path / "set", tmp_path / "cache", choice)
    index = tokenize([str(tmp_path / "set")], tmp_path / "out", tokenizer=choice, workers=1,
                     shard_tokens=most)  # fmt: skip
    found = shards_of(tmp_path / "out")
    assert found.tokenizer.to_str() == expected.tokenizer.to_str()
    assert whole(found) == whole(expected)
    assert found.text_bytes == expected.text_bytes
    for split, tokens in expected.tokens.items():
        documents = sum(shard.documents for shard in index.shards if shard.split == split)
        assert documents == np.count_nonzero(tokens == end_of_document(found.tokenizer)) - 1
    assert sum(shard.tokens for shard in index.shards) == sum(map(len, whole(found).values()))
    for i in range(2):
        batches = [data.batch(i, 5, 7, 1).tokens_BT for data in (found, expected)]
        assert torch.equal(*batches)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


@pytest.fixture
def finished(corpus: Path, small: None) -> Path:
    tokenize([str(corpus)], corpus.parent / "out", workers=1, shard_tokens=2000)
    return corpus.parent / "out"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("after", [0, 5, 12])
def test_after_an_interruption_the_same_call_goes_on(
    after: int, full: bool, corpus: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = corpus.parent / "again", after
    calls: list[Any] = []

    def interrupted(path: Path, text: str) -> None:
        nonlocal left
        left -= 1
        if left < 0 and full:
            raise WriteError(f"{path} could not be written: No space left on device")
        if left < 0:
            raise KeyboardInterrupt
        write_text(path, text)

    def noted(*given: Any) -> Any:
        calls.append(given)
        return write(*given)

    write = Plan._write
    error: Any = (WriteError, r"What is finished is kept; .* the same command goes on")
    with monkeypatch.context() as patch:
        patch.setattr("archdsl.data.tokenization.write_text", interrupted)
        with pytest.raises(
            error[0] if full else KeyboardInterrupt, match=error[1] if full else None
        ):
            tokenize([str(corpus)], out, workers=1, shard_tokens=2000)
        with pytest.raises(DataError, match=r"no .* file in the folder|is not finished: run"):
            load_data(out)
    monkeypatch.setattr(Plan, "_write", noted)
    tokenize([str(corpus)], out, workers=1, shard_tokens=2000)
    assert content(out) == content(finished)
    assert len(calls) < 8 or after < 12


def test_workers_and_a_kill_change_nothing(corpus: Path, finished: Path) -> None:
    out = corpus.parent / "again"
    code = (
        "import sys, time; import archdsl.data.tokenization as t; from pathlib import Path\n"
        "t.SMALLEST_PIECE = 1500; tell = lambda what, done, total: print(what, done, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    t.tokenize([sys.argv[1]], Path(sys.argv[2]), workers=2, shard_tokens=2000, tell=tell)"
    )
    script = corpus.parent / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(corpus), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if re.match("tokenizing [1-9]", line))
        process.send_signal(signal.SIGKILL)
    assert not (out / "index.json").exists()
    tokenize([str(corpus)], out, workers=1, shard_tokens=2000)
    assert content(out) == content(finished)


@pytest.mark.parametrize("change", [{"tokenizer": "bpe:300"}, {"shard_tokens": 9}, {"corpus": 1}])
def test_a_folder_of_other_shards_is_refused(
    change: dict[str, Any], corpus: Path, finished: Path
) -> None:
    if change.pop("corpus", None):
        write_jsonl(corpus, ["other text", "and more"])
    with pytest.raises(DataError, match=r"holds shards of other settings: .* differs"):
        tokenize([str(corpus)], finished, **{"shard_tokens": 2000} | change)
    with pytest.raises(DataError, match="is not an empty folder: choose another --out"):
        tokenize([str(corpus)], corpus.parent)


def test_a_damaged_shard_is_named_when_it_is_read(finished: Path) -> None:
    data = shards_of(finished)
    names = [shard.file for shard in data.shards if shard.split == "train"]
    assert len(names) > 3
    path = finished / names[2]
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    damaged = shards_of(finished)
    assert torch.equal(damaged.held_out("test", 1, 8).__next__().tokens_BT,
                       data.held_out("test", 1, 8).__next__().tokens_BT)  # fmt: skip
    with pytest.raises(DataError, match=rf"{names[2]}' is damaged: its checksum is not that"):
        damaged.batch(0, 64, 64, 0)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{names[2]}' is damaged: it has .* bytes"):
        shards_of(finished)
    path.unlink()
    with pytest.raises(DataError, match=rf"{names[2]}': no such file"):
        shards_of(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../secret-00000.bin"}, r"shards.0.file: String should match pattern"),
        ({"tokens": 2**60}, r"shards.0.tokens: Input should be less than"),
        ({"split": "other"}, r"shards.0.split: Input should be"),
        ({"pickle": 1}, r"shards.0.pickle: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_index_is_refused(change: dict[str, Any], message: str, finished: Path) -> None:
    index = json.loads((finished / "index.json").read_text())
    index["shards"][0] |= change
    (finished / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        load_data(finished)


def test_a_token_beyond_the_vocabulary_is_refused(finished: Path) -> None:
    index = json.loads((finished / "index.json").read_text())
    first = index["shards"][0]
    tokens = np.fromfile(finished / first["file"], "<u2")
    tokens[3] = 257
    tokens.tofile(finished / first["file"])
    first["crc32"] = zlib.crc32(tokens.data)
    (finished / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="it holds the token 257, which the tokenizer has not"):
        load_data(finished).batch(0, 64, 64, 0)


def test_the_tokenizer_of_the_shards_is_that_of_all_data(finished: Path, corpus: Path) -> None:
    tokenize([str(corpus)], corpus.parent / "bpe", tokenizer="bpe:300", workers=1)
    data = shards_of(corpus.parent / "bpe")
    with pytest.raises(DataError, match="is tokenized already, by another tokenizer than 'bytes'"):
        load_data(corpus.parent / "bpe", tokenizer="bytes")
    data.save_tokenizer(corpus.parent / "tokenizer.json")
    for choice in ("bpe:300", str(corpus.parent / "tokenizer.json")):
        assert load_data(data.folder, tokenizer=choice).fingerprint == data.fingerprint
    mixed = load_data([f"{corpus}:1", f"{data.folder}:2"], cache=corpus.parent / "cache")
    assert mixed.vocab_size == data.vocab_size == 300
    with pytest.raises(DataError, match="is tokenized already, by another tokenizer"):
        load_data([str(finished), str(data.folder)])
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent.batch(1, 5, 16, 0).tokens_BT, data.batch(1, 5, 16, 0).tokens_BT)


def test_several_files_are_as_in_one_folder(tmp_path: Path) -> None:
    names = [tmp_path / "set" / name for name in ("a.jsonl", "valid.jsonl", "z_train.txt")]
    for i, name in enumerate(names[:2]):
        write_jsonl(name, [document(100 * i + n) for n in range(30)])
    names[2].write_text(document(7, 500))
    tokenize([*map(str, (names[2], names[1]))], tmp_path / "out", workers=1)
    (tmp_path / "set" / "a.jsonl").unlink()
    assert whole(shards_of(tmp_path / "out")) == whole(load_text(tmp_path / "set", tmp_path))


def test_a_data_set_of_the_hub_is_streamed_and_goes_on(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [write_jsonl(tmp_path / "set" / f"train-{i}.jsonl",
                         [document(100 * i + n) for n in range(30)]) for i in range(2)]  # fmt: skip
    expected = load_text(tmp_path / "set", tmp_path / "cache", "bpe:300")
    load, opened = datasets.load_dataset, list[dict[str, Any]]()

    def local(name: str, config: str | None, **options: Any) -> Any:
        opened.append(options)
        files = {"train": [str(path) for path in names]}
        return load("json", data_files=files, streaming=options["streaming"])

    monkeypatch.setattr("datasets.load_dataset", local)
    monkeypatch.setattr("archdsl.data.hub_stream.revision_of", lambda source: "c0ffee")
    monkeypatch.setattr("archdsl.data.tokenization.LARGEST_PIECE", 500)
    out, write = tmp_path / "out", Plan._write

    def interrupted(plan: Plan, number: int, piece: int, items: Any) -> Any:
        if piece == 1:
            raise KeyboardInterrupt
        return write(plan, number, piece, items)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(["hf:owner/set"], out, tokenizer="bpe:300", workers=1, shard_tokens=2000)
    tokenize(["hf:owner/set"], out, tokenizer="bpe:300", workers=1, shard_tokens=2000)
    assert whole(shards_of(out)) == whole(expected)
    assert opened[-1] == {"revision": "c0ffee", "streaming": True}
