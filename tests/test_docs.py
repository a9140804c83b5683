"""README.md and docs/ are right: commands run, files load, links lead somewhere.

So are the examples in docstrings.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest

import archdsl
from archdsl.lang import template
from archdsl.lang.budget import largest_excess
from archdsl.lang.load import fitted, load, read
from archdsl.lang.source import resolve
from archdsl.lang.spec import walk
from archdsl.reports.tables import short
from tests.cli.command import Cli
from tests.documents import OWN_TEST, ROOT, Page, blocks, inline_commands

README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "docs" / "index.md").read_text()
LANGUAGE = (ROOT / "docs" / "reference" / "language.md").read_text()
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))]
MODULES = [module.name for module in pkgutil.walk_packages(archdsl.__path__, "archdsl.")]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Cli(capsys)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_runs(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / name).read_text()
    if own := OWN_TEST.search(text):
        assert Path(name).name in (ROOT / own[1]).read_text()
        return
    page = Page(cli, monkeypatch)
    for block in blocks(text):
        page.check(block)


@pytest.mark.parametrize("name", PAGES)
def test_the_options_in_its_sentences_exist(name: str, cli: Cli) -> None:
    @cache
    def shown_help(*words: str) -> str:
        ended = cli(*words, "--help")
        assert ended.status == 0, words
        return ended.out

    for words in inline_commands((ROOT / name).read_text()):
        command = words[:2] if words[0] == "study" else words[:1]
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        known = re.findall(r"--[\w-]+", shown_help(*command))
        assert set(options) <= set(known), f"archdsl {' '.join(words)}"


@pytest.mark.parametrize("name", PAGES)
def test_its_links_lead_somewhere(name: str) -> None:
    generated = {"commands.md", "kinds.md", "archdsl.schema.json"}  # by scripts/reference_pages.py
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text()):
        path = (ROOT / name).parent / target
        assert "://" in target or path.exists() or path.name in generated, target


def test_the_family_is_shipped() -> None:
    table = (ROOT / "docs" / "reference" / "models.md").read_text()
    named = re.findall(r"^\|[^|]+\| `([\w-]+)` \|", table, re.MULTILINE)
    assert {"huginn", "retrofit-recurrence-overlay"} <= set(named)
    assert set(named) <= {file.stem for file in (ROOT / "specs").glob("*.yaml")}


def test_the_models_cost_what_the_table_says() -> None:
    row = r"^\|[^|]+\| `([\w-]+)`[^|]*\| (\w+) \| ([\w.]+) \| ([^|]+) \|"
    rows = re.findall(row, README, re.MULTILINE)
    assert {"itt", "ouro", "huginn", "moeut"} <= {name for name, *_ in rows}
    for name, params, flops, verdict in rows:
        spec = archdsl.load(name)
        receipt = archdsl.cost(spec)
        assert (params, flops) == (f"{receipt.params / 1e6:.0f}M", short(receipt.expected)), name
        leaks = any(getattr(part, "leaks", False) for _, part in walk(spec))
        assert verdict == ("sees later tokens" if leaks else "passes"), name


def test_the_table_holds_every_command(cli: Cli) -> None:
    table = re.findall(r"^\| `archdsl (\w+)", INDEX, re.MULTILINE)
    listed = cli("--help").out.partition("Commands:\n")[2]
    assert table == re.findall(r"^  (\w+)", listed, re.MULTILINE)


def test_the_tree_names_folders_and_files_that_exist() -> None:
    [tree] = [block.text for block in blocks(README) if block.text.startswith("archdsl/")]
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        parents[depth:] = [line.split()[0]]
        assert ROOT.joinpath(*parents).exists(), line
    for task in ("learning rate", "KV cache", "HTML report", "PostgreSQL"):
        assert task in tree


def test_the_spec_is_the_shipped_one(tmp_path: Path) -> None:
    [shown] = [block.text for block in blocks(README) if block.language == "yaml"]
    file = tmp_path / "itt.yaml"
    file.write_text(shown)
    assert load(file) == load("itt")


def test_every_family_of_models_is_shipped() -> None:
    table = re.findall(r"^\|[^|]+\| `(\w+)`", README.partition("## Models")[2], re.MULTILINE)
    assert {"transformer", "loop", "itt", "mod", "mor", "universal", "hybrid"} <= set(table)
    assert all(resolve(name).exists() for name in table)


def test_the_language_on_one_screen_builds_and_can_be_searched(tmp_path: Path) -> None:
    shown = next(block.text for block in blocks(LANGUAGE) if block.title == "example.yaml")
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
        read(file),
        lambda name, distribution: "two" if name.endswith("body") else distribution.default,
    )
    assert fitted(two).blocks[2] != spec.blocks[2]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_are_right(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "archdsl.__main__":
        return
    assert doctest.testmod(importlib.import_module(name)).failed == 0
