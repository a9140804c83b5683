"""The cache of tokens is used, made again if damaged, and never left half written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

from archdsl.data.documents import SPLITS
from archdsl.data.loading import load_data
from archdsl.data.types import DataError
from tests.texts import document, documents, load_text, text_of, write_corpus, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


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


def test_a_cache_is_used_but_not_for_changed_text(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = corpus.parent / "cache"
    before = load_text(corpus, cache)
    with monkeypatch.context() as patch:
        patch.setattr("archdsl.data.documents.read_texts", None)
        assert load_text(corpus, cache).fingerprint == before.fingerprint
    assert load_text(corpus, cache, "bpe:300").vocab_size == 300
    times = corpus.stat()
    write_jsonl(corpus, [document(seed) for seed in range(61)])
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_text(corpus, cache)
    assert after.fingerprint != before.fingerprint
    assert document(60) in text_of(after)


def test_an_interrupted_build_leaves_no_incomplete_file(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        yield np.array([1, 2, 3]), 3
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.data.token_cache.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_data(str(corpus), cache=corpus.parent / "cache")
    assert not list((corpus.parent / "cache" / "tokens").iterdir())


@pytest.mark.slow
def test_files_of_a_killed_build_are_not_used(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [document(i, 20_000) for i in range(60)])
    code = (
        "import sys, pathlib; from archdsl.data.loading import load_data;"
        "load_data(sys.argv[1], cache=pathlib.Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "cache")])
    while process.poll() is None and not list((tmp_path / "cache").glob("tokens/*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() < 0, "it was done before it could be killed"
    data = load_text(path, tmp_path / "cache")
    assert sum(len(documents(data.tokens[split])) for split in SPLITS) == 60


def test_several_processes_may_build_the_same_cache_at_once(corpus: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_text(corpus, corpus.parent / "cache"), range(4)))
    assert len({data.fingerprint for data in loaded}) == 1
    assert len({data.batch(5, 8, 32, 0).tokens_BT.sum().item() for data in loaded}) == 1


def test_the_error_for_an_unwritable_cache_says_how_to_move_it(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"\$ARCHDSL_CACHE to use another folder"):
        load_data(str(corpus), cache=corpus)


def test_environment_variables_set_the_folder_of_the_cache(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHDSL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus.parent / "xdg"))
    load_data(str(corpus))
    assert (corpus.parent / "xdg/archdsl/tokens").is_dir()
    monkeypatch.setenv("ARCHDSL_CACHE", str(corpus.parent / "own"))
    load_data(str(corpus))
    assert (corpus.parent / "own/tokens").is_dir()


def test_loading_prints_nothing_and_keeps_the_settings_of_datasets(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    load_data(str(corpus), cache=corpus.parent)
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()


def test_a_cached_corpus_loads_without_the_library_datasets(tmp_path: Path) -> None:
    load_text(None, tmp_path)
    code = (
        "import sys, pathlib; from archdsl.data.loading import load_data;"
        "assert 'tokenizers' not in sys.modules;"
        "load_data(cache=pathlib.Path(sys.argv[1])); assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
