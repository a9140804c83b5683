"""``--plugin``, before and after the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from archdsl.lang import registry
from tests.cli.command import Cli
from tests.plugins import PLUGIN, SPEC, registry_of_its_own


@pytest.fixture(autouse=True)
def _mine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("mine.py").write_text(PLUGIN.format(kind="mine"))
    Path("yours.py").write_text(PLUGIN.format(kind="yours"))
    Path("m.yaml").write_text(SPEC.replace("KIND", "mine"))
    with registry_of_its_own(monkeypatch):
        yield


@pytest.mark.parametrize(
    "words",
    [
        ["--plugin", "mine", "build", "m.yaml"],
        ["build", "m.yaml", "--plugin", "mine"],
        ["build", "--plugin=yours", "m.yaml", "--plugin=mine"],
        ["--plugin", "yours", "build", "m.yaml", "--plugin", "mine"],
        ["build", "m.yaml", "--plugin", "mine,yours"],
    ],
    ids=" ".join,
)
def test_it_may_stand_before_or_after_the_command(cli: Cli, words: list[str]) -> None:
    assert cli(*words, "--json").json["name"] == "m"


def test_without_it_the_error_says_how_to_load_a_plugin(cli: Cli) -> None:
    done = cli("build", "m.yaml")
    assert done.status == 2
    assert "unknown kind 'mine' of block" in done.err
    assert "--plugin PACKAGE.MODULE (plugins loaded: none)" in done.err


def test_a_plugin_that_is_not_there_is_an_error_in_one_line(cli: Cli) -> None:
    done = cli("build", "m.yaml", "--plugin", "nowhere")
    assert done.status == 2
    assert done.err.startswith("cannot import the plugin 'nowhere' (named by --plugin or ARCHDSL_")
    assert done.err.count("\n") == 1


def test_its_kinds_are_in_the_catalogue_and_its_commands_know_it(cli: Cli) -> None:
    assert "Does nothing." in cli("blocks", "mine", "--plugin", "mine").out
    for command in (["build"], ["train"], ["search"], ["study", "ls"], ["study"], []):
        assert "--plugin MODULE" in cli(*command, "--help").out


@pytest.mark.parametrize(
    "words",
    [
        ["--plugin", "mine", "study", "ls"],
        ["study", "--plugin", "mine", "ls"],
        ["study", "ls", "--plugin", "mine"],
    ],
    ids=" ".join,
)
def test_it_may_stand_anywhere_around_the_commands_on_studies(cli: Cli, words: list[str]) -> None:
    done = cli(*words)
    assert (done.status, done.err) == (0, "")
    assert registry.plugin_modules() == ["mine"]


@pytest.mark.parametrize("command", [["build", "tiny"], ["study", "ls"], ["schema"]])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("", "--plugin needs the name of a Python module, such as my_blocks; got ''"),
        ("nowhere", "cannot import the plugin 'nowhere' (named by"),
        ("empty", "the plugin 'empty' (named by --plugin or ARCHDSL_PLUGINS) defines no kind"),
    ],
)
def test_a_wrong_one_is_told_by_every_command(
    cli: Cli, command: list[str], module: str, message: str
) -> None:
    Path("empty.py").touch()
    for words in (["--plugin", module, *command], [*command, "--plugin", module]):
        done = cli(*words)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(message)
        assert done.err.count("\n") == 1


def test_one_that_the_variable_names_is_told_as_well(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty.py").touch()
    monkeypatch.setenv(registry.VARIABLE, "empty")
    assert "the plugin 'empty' (named by --plugin or ARCHDSL_PLUGINS) defines" in cli("schema").err
