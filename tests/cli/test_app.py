"""All commands: help, mistakes, how output looks, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import archdsl
from archdsl.cli import let_idle_threads_sleep, study
from archdsl.cli.app import COMMANDS
from archdsl.lang import load as load_module
from tests.cli.command import SKILL, Cli

HEAVY = {"torch", "transformers", "datasets", "optuna", "numpy"}
OF_SPECS = {"pydantic", "rich"}  # what takes longest where a spec is read and shown

ANSWER = """
import sys
from archdsl.cli import main
try: main()
except SystemExit as end: status = end.code or 0
print("\\nFACTS", status, *sys.modules)
"""


def answer(*arguments: str, **environment: str) -> tuple[int, str, set[str]]:
    """Status, output and imported modules of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | environment,
    )
    out, _, facts = done.stdout.rpartition("\nFACTS ")
    status, *modules = facts.split()
    return int(status), out, set(modules)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["build", "--help"], 0),
        (["search", "--help"], 0),
        (["study", "ls", "--help"], 0),
        (["buidl"], 2),
        (["build", "itt", "--bugdet", "162M"], 2),
        (["train", "tiny", "--step", "3"], 2),
    ],
)
def test_answers_about_itself_with_next_to_no_imports(arguments: list[str], status: int) -> None:
    found, _, modules = answer(*arguments)
    assert found == status
    # some options are the fields of a config
    of_config = arguments[0] in ("train", "search")
    assert not modules & (HEAVY if of_config else HEAVY | OF_SPECS)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["train", "--help"], 0),
        (["schema"], 0),
        (["blocks"], 0),
        (["diff", "loop", "itt"], 0),
        (["build", "itt"], 0),
        (["build", "it"], 2),
        (["build", "itt", "--set", "dim=0"], 2),
        (["build", "itt", "--budget", "1M"], 1),
        (["search", "serch"], 2),
        (["search", "--budget", "162Q"], 2),
        (["train", "tiny", "--lr", "fast"], 2),
    ],
)
def test_answers_about_specs_without_importing_what_is_heavy(
    arguments: list[str], status: int
) -> None:
    found, _, modules = answer(*arguments)
    assert found == status
    assert not modules & HEAVY


def test_a_model_is_loaded_without_the_compiler_of_torch(cli: Cli) -> None:
    """Its import takes longer than that of torch itself."""
    assert cli("build", "tiny", "--out", "made").status == 0
    status, _, modules = answer("generate", "made", "a", "--max-tokens", "1")
    assert status == 0
    assert "torch" in modules
    assert "torch._dynamo" not in modules


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("archdsl bu", ["build"]),
        ("archdsl build itt --bu", ["--budget", "--budget-of"]),
        ("archdsl study l", ["ls"]),
    ],
)
def test_completes_at_once(words: str, completed: list[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    status, out, modules = answer(_ARCHDSL_COMPLETE="complete_bash", **asked)
    assert (status, out.split()) == (0, completed)
    assert not modules & (HEAVY | OF_SPECS)


@pytest.mark.parametrize(
    "command",
    [
        "build",
        "search",
        "ablate",
        "retrofit",
        "tokenize",
        "train",
        "eval",
        "generate",
        "gradients",
        "check",
        "diff",
        "blocks",
        "schema",
    ],
)
def test_every_help_has_an_example(cli: Cli, command: str) -> None:
    found = cli(command, "--help")
    assert found.status == 0
    assert f"    archdsl {command}" in found.out


def test_a_mistyped_option_is_met_with_the_right_one(cli: Cli) -> None:
    found = cli("build", "itt", "--bugdet", "162M")
    assert (found.status, found.out) == (2, "")
    assert "--budget" in found.err


def test_all_that_is_wrong_with_a_spec_comes_at_once_and_plainly(cli: Cli) -> None:
    Path("bad.yaml").write_text(
        "name: bad\nvocab_size: 10\ncontext: 8\ndim: 8\nblocks:\n"
        "  - {kind: lair}\n  - {kind: loop, stepz: 2, body: layer}\n"
    )
    found = cli("build", "bad.yaml")
    assert (found.status, found.out) == (2, "")
    first, second = found.err.splitlines()
    assert first.startswith("bad.yaml:6:12: blocks.0.kind: unknown kind 'lair'")
    assert second.startswith("bad.yaml:7:")
    assert "(did you mean 'steps'?)" in second


def test_mistaken_options_come_at_once_and_in_the_words_of_the_command(cli: Cli) -> None:
    found = cli("train", "tiny", "--lr", "1e999", "--batch-size", "0", "--betas", "3")
    assert (found.status, found.out) == (2, "")
    assert [line.partition(":")[0] for line in found.err.splitlines()] == [
        "--batch-size",
        "--betas",
        "--lr",
    ]


def test_an_interrupt_says_so_in_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("the same command goes on")

    monkeypatch.setattr(load_module, "load", interrupt)
    found = cli("build", "tiny")
    assert (found.status, found.out) == (130, "")
    assert found.err == "interrupted: the same command goes on\n"


FIGURE = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?[kMBGT]?(?![\w.])")


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize(
    "command",
    [
        ["build", "itt"],
        ["build", "hybrid", "--budget", "100M", "--convention", "paper"],
        ["diff", "loop", "itt"],
        ["blocks"],
        ["blocks", "loop"],
    ],
)
def test_a_narrow_terminal_loses_no_figure(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str], width: int
) -> None:
    wide = re.sub(r" [0-9.]+%$", "", cli(*command).out, flags=re.MULTILINE)  # a share of the others
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = cli(*command).out
    assert max(map(len, narrow.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
    assert set(FIGURE.findall(wide)) <= set(FIGURE.findall(narrow))


@pytest.mark.parametrize("command", [["build", "itt"], ["diff", "loop", "itt"], ["blocks", "loop"]])
def test_a_pipe_gets_plain_text(cli: Cli, command: list[str]) -> None:
    out = cli(*command).out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line.endswith(" ")]


def test_colours_can_be_had_and_declined(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in cli("build", "itt").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("build", "itt").out


@pytest.mark.parametrize(
    "command",
    [["build", "hybrid"], ["diff", "loop", "itt"], ["blocks"], ["blocks", "loop"], ["schema"]],
)
def test_json_is_all_that_it_prints(cli: Cli, command: list[str]) -> None:
    found = cli(*command, *([] if command == ["schema"] else ["--json"]))
    assert found.json
    assert found.err == ""


# what they print is no result: a schema is JSON, and a deleted study is gone
WITHOUT_JSON = {"schema", "rm"}


def test_every_command_with_a_result_can_print_it_as_json() -> None:
    functions = {name: function for name, (function, _) in COMMANDS.items()}
    functions |= {
        str(command.name or command.callback.__name__): command.callback
        for command in study.app.registered_commands
        if command.callback
    }
    with_json = {
        name for name, function in functions.items() if "as_json" in signature(function).parameters
    }
    assert set(functions) - with_json == WITHOUT_JSON


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    # src is found wherever the process stands
    root = Path(archdsl.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "archdsl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_goes_on(tmp_path: Path) -> None:
    command = ["train", "tiny", "--data", SKILL, "--context", "8", "--steps", "100000"]
    process = start(*command, "--out", "run", cwd=tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted: stopped after step ")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [["schema"], ["build", "hybrid"], ["--help"]])
def test_a_reader_that_leaves_is_no_fault(command: list[str], tmp_path: Path) -> None:
    process = start(*command, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    process.stderr.close()


def test_idle_threads_sleep_unless_the_user_wants_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
