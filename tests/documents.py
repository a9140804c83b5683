"""The fenced blocks of a page of the documentation, and how its commands are run or checked.

A console block holds commands after ``$ ``; a line that ends in a backslash goes on in the next
one, all other lines show output. By default each command runs, page by page, in one folder. A block
whose language is followed by ``title="NAME"`` is written to the file NAME in that folder. A comment
directly above a block changes what the test does with it:

    <!-- test: only parsed, REASON -->           the commands are not run, their options must exist
    <!-- test: "--steps 400" is "--steps 2" -->  the test replaces this text, several by "; "
    <!-- test: exit status 1 -->                 the last command ends with this status
    <!-- test: exact output -->                  the command prints exactly what the block shows

A page whose commands need processes of their own says so once:

    <!-- test: this page has its own test, tests/FILE.py -->
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.core import TyperCommand

from tests.cli.command import Cli

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
# programs of others, whose options are not checked
FOREIGN = {".", "cd", "export", "mkdir", "optuna-dashboard", "source", "trl", "vllm"}
OWN_TEST = re.compile(r"^<!-- test: this page has its own test, (tests/\S+) -->$", re.MULTILINE)
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>[^\n]*?) -->\n+)?"
    r"(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is written to, its text and its mark."""

    language: str
    title: str
    text: str
    mark: str

    @property
    def commands(self) -> list[str]:
        """What follows each ``$ ``, continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]

    @property
    def output(self) -> str:
        """What the block shows after its only command."""
        return self.text.partition("\n")[2]

    @property
    def status(self) -> int:
        found = re.search(r"exit status (\d+)", self.mark)
        return int(found[1]) if found else 0

    @property
    def replaced(self) -> list[tuple[str, str]]:
        return re.findall(r'"([^"]+)" is "([^"]*)"', self.mark)

    def for_test(self, text: str) -> str:
        """The text with what the mark replaces; ``\\n`` in a mark is a new line."""
        for old, new in self.replaced:
            text = text.replace(old, new.replace("\\n", "\n"))
        return text


def blocks(page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page):
        lines = match["text"].splitlines(keepends=True)
        text = "".join(line.removeprefix(match["indent"]) for line in lines)
        found.append(Block(match["language"], match["title"] or "", text, match["mark"] or ""))
    return found


@dataclass
class Page:
    """Runs the blocks of one page in order, in the current folder."""

    cli: Cli
    monkeypatch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def check(self, block: Block) -> None:
        for old, _ in block.replaced:
            assert old in block.text, f"the mark replaces {old!r}, which the block does not hold"
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.for_test(block.text))
        if block.language == "python":
            self.python(block)
        elif block.language == "console":
            assert block.commands, "a console block has a command after `$ `"
            for command in block.commands:
                self.command(command, block)
        else:
            for command in re.findall(r"^ *(archdsl .*?[^\\])$", block.text, re.M | re.S):
                assert block.language == "bash", f"a command outside of a console block: {command}"
                self.parse(re.sub(r"\$\w+", "1", command).replace("\\\n", " ").removesuffix("&"))
            for words in re.findall(r"command: \[(archdsl,[^]]*)\]", block.text):
                self.parse(" ".join(word.strip() for word in words.split(",")))

    def python(self, block: Block) -> None:
        code = compile(block.text, block.title or "example.py", "exec")
        if not block.title and not block.mark.startswith("only parsed"):
            exec(code, self.names)

    def command(self, command: str, block: Block) -> None:
        self.parse(command)
        if block.mark.startswith("only parsed"):
            return
        parts = block.for_test(command).split("&&")
        printed = "".join(self.run(part.strip(), block.status) for part in parts)
        if block.mark == "exact output":
            assert printed == block.output

    def run(self, command: str, status: int) -> str:
        """Run one command, archdsl in this process; return what it prints."""
        command, _, file = command.partition(" > ")
        words = shlex.split(command, comments=True)
        if words[0] == "archdsl":
            ended = self.cli(*words[1:])
            assert ended.status == status, f"{command}\n{ended.out}{ended.err}"
            printed = ended.out
        elif words[0] == "python" and words[1].endswith(".py"):
            self.cli.capsys.readouterr()
            self.monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
            printed = self.cli.capsys.readouterr().out
        elif words[0] in {"make", "pip", *FOREIGN} or words[:2] == ["python", "-m"]:
            return ""  # what they need was checked by parse
        else:
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
            assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
            printed = done.stdout
        if file:
            Path(file).write_text(printed)
        return printed

    def parse(self, command: str) -> None:
        """Fail unless every part of the command names a program and options that exist."""
        for part in command.split("&&"):
            words = shlex.split(part.partition(" > ")[0], comments=True)
            match words:
                case ["archdsl", *arguments]:
                    self.parse_archdsl(arguments)
                case ["make", target]:
                    assert target in TARGETS, command
                case ["pip", "install", *packages]:
                    for package in packages:
                        installable(package)
                case ["python", "-m", "pytest" | "pip" | "venv", *_]:
                    pass
                case ["python", "-m", module, *arguments]:
                    self.parse_script(module, arguments)
                case ["python", file, *_]:
                    assert Path(file).exists() or (ROOT / file).exists(), command

    def parse_archdsl(self, arguments: list[str]) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(TyperCommand, "invoke", lambda self, ctx: None)
            ended = self.cli(*arguments)
        assert ended.status == 0, f"archdsl {shlex.join(arguments)}\n{ended.err}"

    def parse_script(self, module: str, arguments: list[str]) -> None:
        """Run a module of this project up to where it has read its options."""
        read = argparse.ArgumentParser.parse_args

        def parse_args(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
            read(parser, *given)
            raise SystemExit("the options were read")

        with self.monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(SystemExit, match="the options were read"):
                importlib.import_module(module).main()


def installable(package: str) -> None:
    """Fail if an extra of archdsl or a file of this project does not exist."""
    if extras := re.fullmatch(r"(?:archdsl|\.)\[(.+)\]", package):
        assert set(extras[1].split(",")) <= set(EXTRAS), package
    elif "/" in package:
        assert (ROOT / package).exists(), package


def inline_commands(page: str) -> list[list[str]]:
    """The words of each `archdsl COMMAND ...` that stands in a sentence or a table."""
    prose = BLOCK.sub("", page)
    spans = re.findall(r"`(archdsl [a-z][^`]*)`", prose)
    return [span.replace("\\|", "|").split()[1:] for span in spans]
