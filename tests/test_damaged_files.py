"""Whatever is done to files that archdsl has written, reading them ends well or with its own error.

The files are altered as a faulty program or disk would: bytes, fields, values, lengths. Where a
checkpoint keeps checksums, they are made to fit, so that what reads the files meets the damage.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archdsl.errors import ArchdslError
from archdsl.model.checkpoint import load_checkpoint, load_training
from archdsl.search.report.live import listing, standing
from archdsl.search.studies import export, studies, study
from archdsl.training.run import train
from tests.search.test_search import SPACE, go
from tests.training.damage import forge
from tests.training.test_run import CONFIG, SKILL, HookedData, Killed, kill, spec

VALUES: list[Any] = [
    *(None, True, 0, -1, 2**70, 0.5, float("nan"), float("inf"), "", "text", "\0", [], [1]),
    *({}, {"a": 1}, [[]], [None]),
]
JSON = {".json", ".jsonl", ".journal"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an interrupted run, of a finished one, and of a search."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 11, kill), CONFIG, folder / "interrupted")
    train(spec(), SKILL, CONFIG, folder / "finished")
    (folder / "small.yaml").write_text(SPACE)
    go(folder / "small.yaml", folder / "search", trials=2)
    return folder


# What reads the files of each folder


def read_run(folder: Path) -> None:
    for checkpoint in (folder / "final", *(folder / "checkpoints").glob("*")):
        for read in (load_checkpoint, load_training):
            try_to(lambda read=read, path=checkpoint: read(path))  # type: ignore[misc]
    train(spec(), SKILL, CONFIG, folder)


def read_search(folder: Path) -> None:
    for found in studies(folder):
        listing([found])
    found = study(str(folder))
    found.as_json()
    export(found, "csv")
    export(found, "jsonl")
    standing(found)


def search_on(folder: Path) -> None:
    go(folder.parent / "small.yaml", folder, trials=3)


def try_to(read: Callable[[], object]) -> str:
    """Returns the message of an error of archdsl; all others are faults, and are not caught."""
    try:
        read()
    except ArchdslError as error:
        return str(error)
    return ""


# What is done to them


def in_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    garbage = rng.randbytes(rng.randint(1, 20))
    return rng.choice(
        [
            content[:at],
            content[:at] + garbage + content[at + len(garbage) :],
            content[:at] + garbage + content[at:],
            content[:at] + content[at + rng.randint(1, 200) :],
            content + garbage,
            bytes(len(content)),
            b"",
        ]
    )


def in_a_value(value: Any, rng: random.Random) -> Any:
    """Removes, adds or replaces something at any depth."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not inner:
        return rng.choice(VALUES)
    key = rng.choice(inner)
    if isinstance(value[key], dict | list) and rng.random() < 0.8:
        value[key] = in_a_value(value[key], rng)
    elif rng.random() < 0.3:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value["unexpected"] = rng.choice(VALUES)
    else:
        value[key] = rng.choice(VALUES)
    return value


def in_json(content: bytes, rng: random.Random) -> bytes:
    try:
        json.loads(content)
        lines = [content]
    except ValueError:  # one object on each line
        lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(in_a_value(json.loads(lines[at]), rng)).encode()
    return b"\n".join([*lines, b""])


def in_tensors(content: bytes, rng: random.Random) -> bytes:
    """Alters the header of a safetensors file, whose length stands before it."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(in_a_value(json.loads(content[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def damage(files: list[Path], rng: random.Random) -> str:
    """Alters one of the files; returns which and how."""
    file = rng.choice(files)
    how: Callable[[bytes, random.Random], bytes] = in_bytes
    if rng.random() < 0.75 and file.suffix in JSON:
        how = in_json
    elif rng.random() < 0.5 and file.suffix == ".safetensors":
        how = in_tensors
    content = how(file.read_bytes(), rng)
    if (file.parent / "provenance.json").exists() and file.name != "provenance.json":
        forge(file.parent, file.name, content)
    else:
        file.write_bytes(content)
    return f"{file}, {how.__name__}"


Reader = tuple[Callable[[Path], None], str]  # and what it reads
RUN: Reader = (read_run, "**/*.*")
READERS: dict[str, Reader] = {
    "interrupted": RUN,
    "finished": RUN,
    "search": (read_search, "*.j*"),
}


def check(written: Path, tmp_path: Path, name: str, reader: Reader, seed: str) -> str:
    read, pattern = reader
    shutil.copytree(written, tmp_path / "copy")
    folder = tmp_path / "copy" / name
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    what = damage(files, random.Random(seed))
    try:
        told = try_to(lambda: read(folder))
    except Exception as error:
        error.add_note(f"seed {seed}: {what}")
        raise
    shutil.rmtree(tmp_path / "copy")
    return told


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(written: Path, tmp_path: Path, name: str) -> None:
    told = [check(written, tmp_path, name, READERS[name], f"{name} {n}") for n in range(10)]
    assert any(told)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_read_or_refused(written: Path, tmp_path: Path, name: str) -> None:
    for n in range(100, 140):
        check(written, tmp_path, name, READERS[name], f"{name} {n}")


@pytest.mark.slow
def test_a_search_in_damaged_files_goes_on_or_is_refused(written: Path, tmp_path: Path) -> None:
    for n in range(6):
        check(written, tmp_path, "search", (search_on, "**/*.*"), f"on {n}")
