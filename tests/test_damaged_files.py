"""Whatever is done to a file, every command that reads it ends well or with an error of archdsl.

The files are altered as a faulty program or disk would, or as somebody who means harm: bytes,
fields, values, types, lengths. Where a checkpoint keeps checksums, they are made to fit, so that
the reader meets the damage. Or something that is no file stands in the place of one.

``python -m tests.test_damaged_files 2400`` alters so many files, and prints a table of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.artefacts import ARTEFACTS, Command, Outcome, make, ran
from tests.training.damage import forge

VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 2**70, 0.5, float("nan"), float("inf"), "", "text", "\0", [], [1]),
    *({}, {"a": 1}, [[]], [None], "1", 1.0, "../../etc/passwd", "a" * 5000, -(2**31), 1e308),
]
OTHER_TYPES = {"F32": ["I32", "U32"], "F16": ["I16"], "BF16": ["I16"], "I64": ["F64", "U64"]}
YAML_LINES = [": ", "- x", "&a [*a]", "!!python/object:os.system {}", "dim: [", "\t", "'", "a: 1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        make(folder, patch)
        yield folder


# What is done to files


def in_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    garbage = rng.randbytes(rng.randint(1, 20))
    return rng.choice(
        [
            content[:at],
            content[:at] + garbage + content[at + len(garbage) :],
            content[:at] + garbage + content[at:],
            content[:at] + content[at + rng.randint(1, 200) :],
            content[:at] + content[: rng.randint(1, 200)] + content[at:],
            content + garbage,
            bytes(len(content)),
            b"",
            b"\xef\xbb\xbf" + content,
            b"[" * 100_000,
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


def in_lines(content: bytes, rng: random.Random) -> bytes:
    """Removes, repeats, swaps or replaces lines of a text such as YAML."""
    lines = content.decode().split("\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.randrange(6)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[other])
    elif what == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif what == 3:
        lines[at] = " " * rng.randint(0, 8) + lines[at].strip()
    elif what == 4:
        lines.insert(at, rng.choice(YAML_LINES))
    else:
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {json.dumps(rng.choice(VALUES))}"
    return "\n".join(lines).encode()


def in_tensors(content: bytes, rng: random.Random) -> bytes:
    """Alters the header of a safetensors file, whose length stands before it."""
    return with_header(content, lambda header: in_a_value(header, rng))


def in_types(content: bytes, rng: random.Random) -> bytes:
    """Gives a tensor another type of the same size: its values are others then."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        header[name]["dtype"] = rng.choice(OTHER_TYPES[header[name]["dtype"]])
        return header

    if b"dtype" not in content:  # a finished training keeps no tensors
        return content

    return with_header(content, change)


def with_header(content: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


Damage = Callable[[bytes, random.Random], bytes]
BY_KIND: dict[str, list[Damage]] = {
    ".safetensors": [in_bytes, in_tensors, in_types],
    ".yaml": [in_bytes, in_lines, in_lines],
    ".txt": [in_bytes, in_lines],
    **{kind: [in_bytes, in_json, in_json, in_json] for kind in (".json", ".jsonl", ".journal")},
}


def damage(file: Path, rng: random.Random) -> str:
    """Alters a file; returns how."""
    how = rng.choice(BY_KIND.get(file.suffix, [in_bytes]))
    before = file.read_bytes()
    content = how(before, rng)
    if content == before:
        return "unchanged"
    if (file.parent / "provenance.json").exists() and file.name != "provenance.json":
        with suppress(KeyError):
            forge(file.parent, file.name, content)
    else:
        file.write_bytes(content)
    return how.__name__


# What stands in the place of files


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(here)


PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": a_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


# Each case


def files_of(name: str) -> list[Path]:
    """The files of an artefact, below the working directory."""
    before, brace, rest = ARTEFACTS[name].files.partition("{")
    words, _, after = rest.partition("}")
    patterns = [before + word + after for word in words.split(",")] if brace else [before]
    found = [path for one in patterns for path in sorted(Path().glob(one)) if path.is_file()]
    assert found, name
    return found


def in_a_copy(written: Path, work: Callable[[], Outcome]) -> Outcome:
    """Does the work in a copy of the artefacts, which is the working directory meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(written, Path(scratch) / "copy"))
        os.chdir(copy)
        try:
            return work()
        finally:
            os.chdir(written)


def altered(written: Path, name: str, seed: int) -> tuple[str, Outcome]:
    """Alters a file of the artefact and reads it; returns what was done, and the outcome."""
    rng = random.Random(f"{name} {seed}")
    file, command = rng.choice(files_of(name)), rng.choice(ARTEFACTS[name].commands)
    done: list[str] = []

    def work() -> Outcome:
        done.append(damage(file, rng))
        return ran(command, file)

    outcome = in_a_copy(written, work)
    if done[0] == "in_types" and outcome.status == 0 and ARTEFACTS[name].all_is_read:
        outcome = Outcome(0, outcome.said, "tensors of another type were taken")
    return f"{name}, seed {seed}: {file} {done[0]}", outcome


def replaced(written: Path, file: Path, kind: str, command: Command) -> tuple[str, Outcome]:
    """Puts something else in the place of a file, and reads it."""

    def work() -> Outcome:
        file.unlink()
        PLACES[kind](file)
        return ran(command, file)

    outcome = in_a_copy(written, work)
    if outcome.status > 0 and not outcome.fault:
        named = [part for part in (file.name, str(file.parent)) if part in outcome.said]
        if not named and len(outcome.said.splitlines()) < 20:
            outcome = Outcome(outcome.status, outcome.said, f"not named: {outcome.said[-300:]}")
    return f"{kind} for {file}", outcome


def every_place(name: str) -> list[tuple[Path, str, Command]]:
    return [
        (file, kind, command)
        for file in files_of(name)
        for kind in PLACES
        for command in ARTEFACTS[name].commands
    ]


@pytest.mark.parametrize("name", ARTEFACTS)
def test_damaged_files_are_read_or_refused(written: Path, name: str) -> None:
    found = [altered(written, name, seed) for seed in range(2)]
    assert [case for case in found if case[1].fault] == []


@pytest.mark.parametrize("name", ARTEFACTS)
def test_what_is_no_file_is_refused(written: Path, name: str) -> None:
    cases = random.Random(name).sample(every_place(name), 2)
    found = [replaced(written, *case) for case in cases]
    assert [case for case in found if case[1].fault] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_many_damaged_files_are_read_or_refused(written: Path, name: str) -> None:
    found = [altered(written, name, seed) for seed in range(100, 110)]
    assert [case for case in found if case[1].fault] == []


def main(count: int, places: int) -> None:
    """Alters ``count`` files and replaces ``places``, and prints how many cases were refused."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        written = Path(folder).resolve()
        make(written, patch)
        for name in ARTEFACTS:
            seeds = range(1000, 1000 + -(-count // len(ARTEFACTS)))
            told = Counter(_told(altered(written, name, seed)) for seed in seeds)
            some = every_place(name)
            some = random.Random(name).sample(some, min(len(some), places // len(ARTEFACTS)))
            odd = Counter(_told(replaced(written, *case)) for case in some)
            print(f"{name}: altered {dict(told)}, replaced {dict(odd)}", flush=True)


def _told(case: tuple[str, Outcome]) -> str:
    what, outcome = case
    if outcome.fault:
        print(f"FAULT {what}: {outcome.fault}\n    {outcome.said[-500:]}", flush=True)
        return "fault"
    return "read" if outcome.status == 0 else "refused"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
