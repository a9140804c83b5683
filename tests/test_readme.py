"""What the README says is so; examples in docstrings too."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import archdsl
from archdsl.cli.app import app
from archdsl.lang import template
from archdsl.lang.budget import largest_excess
from archdsl.lang.load import fitted, load, read
from archdsl.lang.source import resolve

README = (Path(__file__).parents[1] / "README.md").read_text()
MODULES = [module.name for module in pkgutil.walk_packages(archdsl.__path__, "archdsl.")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        app(list(arguments), prog_name="archdsl")
    return capsys.readouterr().out


def test_begins_with_the_two_commands_that_the_makefile_has() -> None:
    commands = re.findall(r"^make (\w+)", blocks("")[0], re.MULTILINE)
    assert commands == ["search", "test"]
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_the_receipt_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command, _, shown = blocks("")[1].partition("\n")
    assert printed(capsys, *shlex.split(command.removeprefix("$ archdsl"))) == shown


def test_the_table_holds_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    table = re.findall(r"^\| `archdsl (\w+)", README, re.MULTILINE)
    listed = printed(capsys, "--help").partition("Commands:\n")[2]
    assert table == re.findall(r"^  (\w+)", listed, re.MULTILINE)


def test_the_spec_is_the_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "itt.yaml"
    file.write_text(blocks("yaml")[0])
    assert load(file) == load("itt")


def test_the_language_on_one_screen_builds_and_can_be_searched(tmp_path: Path) -> None:
    shown = blocks("yaml")[1]
    assert len(shown.splitlines()) <= 30
    (tmp_path / "itt.yaml").write_text(resolve("itt").read_text())
    file = tmp_path / "example.yaml"
    file.write_text(shown)
    spec = load(file)
    assert spec.budget is not None
    assert archdsl.cost(spec).params <= 162e6
    assert largest_excess(spec.model_copy(update={"dim": spec.dim + 256}), spec.budget) > 0

    found = template.find(read(file))
    assert set(found) == {
        "blocks.2.steps",
        "blocks.2.router.capacity.0",
        "blocks.2.body",
    }
    two = template.fill(
        read(file), lambda name, leaf: "two" if name.endswith("body") else leaf.default
    )
    assert fitted(two).blocks[2] != spec.blocks[2]


def test_the_python_example_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    spec = load("tiny", overrides=["blocks.1.steps=4"])
    assert lines[0].split()[0] == str(archdsl.cost(spec).params)
    assert 0 <= float(lines[1]) <= 1
    assert lines[2] == "name: tiny"
    assert any("capacity: 0.7" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_are_right(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "archdsl.__main__":
        return
    assert doctest.testmod(importlib.import_module(name)).failed == 0
