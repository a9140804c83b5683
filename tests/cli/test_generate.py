"""generate."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from archdsl.cli.app import app
from archdsl.generation.sampling_config import Sampling
from tests.cli.command import SKILL, Cli

GREEDY = ["--temperature", "0", "--max-tokens", "6"]


@pytest.fixture
def made(cli: Cli) -> Cli:
    """A model of random weights in `made`, which writes bytes at random."""
    assert cli("build", "tiny", "--set", "context=32", "--out", "made").status == 0
    return cli


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(made: Cli) -> None:
    found = made("generate", "made", "Hello", "--max-tokens", "6")
    assert found.status == 0, found.err
    facts = made("generate", "made", "Hello", "--max-tokens", "6", "--json")
    assert facts.err == ""
    assert found.out == f"{facts.json['text']}\n"
    prompt, text, stopped = found.err.splitlines()
    assert prompt.startswith("prompt: 5 tokens at ")
    assert text.startswith("text: 6 tokens at ")
    assert "further thinking steps per token (selected: blocks.1.0 " in text
    assert stopped == "stopped after 6 tokens (--max-tokens)"
    many = made("generate", "made", "Hello", "--max-tokens", "6", "--steps", "7", "--capacity", "1")
    assert many.err.count("(selected: 100% to 100% by 6 routed steps)") == 2


def test_json_has_the_tokens_the_pace_and_the_shares(made: Cli) -> None:
    found = made("generate", "made", "Hello", "--max-tokens", "6", "--json").json
    assert len(found["tokens"]) == 6
    assert found["stopped"] == "length"
    assert (found["prefill"]["tokens"], found["decode"]["tokens"]) == (5, 5)
    for pace in (found["prefill"], found["decode"]):
        assert pace["tokens_per_s"] > 0
        assert sum(pace["shares"].values()) == pytest.approx(pace["thinking_steps"])


def test_the_seed_and_the_dial_decide_the_text(made: Cli) -> None:
    def text(*options: str) -> str:
        return str(made("generate", "made", "Hello", "--json", *options).json["text"])

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text(*GREEDY) == text("--top-k", "1", "--seed", "7", "--max-tokens", "6")
    shallow = made("generate", "made", "Hello", "--json", "--capacity", "0").json
    deep = made("generate", "made", "Hello", "--json", "--capacity", "1,1,1", "--steps", "4").json
    assert (shallow["thinking_steps"], deep["thinking_steps"]) == (0, 3)
    wrong = made("generate", "made", "Hello", "--capacity", "1.5")
    assert (wrong.status != 0, wrong.out) == (True, "")
    assert "between 0 and 1, got 1.5" in wrong.err


def test_it_stops_at_the_context_and_says_so(made: Cli) -> None:
    found = made("generate", "made", "Hello", "--temperature", "0")
    assert found.err.endswith("stopped at the context limit of 32 tokens\n")
    long = made("generate", "made", "x" * 40)
    assert (long.status, long.out) == (2, "")
    assert long.err.startswith("the prompt has 40 tokens and the context of tiny is 32")


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_prompt_from_stdin_is_the_same_as_one_on_the_command_line(
    made: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = made("generate", "made", "Hello €", *GREEDY).out
    feed(monkeypatch, "Hello €\n".encode())
    assert made("generate", "made", "-", *GREEDY).out == given
    feed(monkeypatch, b"\xff")
    assert (
        made("generate", "made", "-").err
        == "stdin:1: this is not UTF-8 text; save the file as UTF-8\n"
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        # a line separator separates no lines
        ("p.txt", "Hello\r\n\n  naïve\u2028 \n"),
        (
            "p.jsonl",
            '{"prompt":"Hello"}\n{"prompt":""}\n{"id":3, "prompt":"  na\\u00efve\u2028 "}\n',
        ),
    ],
)
def test_many_prompts_from_a_file_are_the_same_as_each_alone(
    made: Cli, name: str, lines: str
) -> None:
    Path(name).write_bytes(lines.encode())
    options = ["--prompts", name, "--max-tokens", "6", "--batch-size", "2"]
    printed = made("generate", "made", *options)
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["prompt"] for line in found] == ["Hello", "", "  naïve\u2028 "]
    for line in found:
        alone = made("generate", "made", line["prompt"], "--max-tokens", "6", "--json").json
        assert (line["text"], line["tokens"]) == (alone["text"], alone["tokens"])
    written = made("generate", "made", *options, "--out", "texts.jsonl", "--json")
    assert Path("texts.jsonl").read_text() == printed.out
    assert written.json["prefill"]["tokens"] == 5 + 1 + 12
    assert "3 texts stopped after 6 tokens" in printed.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"text": "b"}\n', r'p.jsonl:2: expected an object such as {"prompt"'),
        (b'{"prompt": 3}\n', "p.jsonl:1: expected an object"),
        (b"a\n", "p.jsonl:1: this line is not a JSON object"),
        (b"[" * 100_000, "p.jsonl:1: this line is not a JSON object"),
        (b'{"prompt": "\xff"}', "p.jsonl:1: this is not UTF-8 text"),
        (b"", "p.jsonl is empty"),
        (None, "p.jsonl does not exist"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_words(
    made: Cli, content: bytes | None, said: str
) -> None:
    if content is not None:
        Path("p.jsonl").write_bytes(content)
    found = made("generate", "made", "--prompts", "p.jsonl", "--out", "out.jsonl")
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith(said)
    assert not Path("out.jsonl").exists()


def test_a_think_map_is_written_beside_the_text(made: Cli) -> None:
    found = made("generate", "made", "<b>", *GREEDY, "--capacity", "1,0", "--think-map", "map.html")
    assert found.status == 0, found.err
    html = Path("map.html").read_text(encoding="utf-8")
    assert "Think map: tiny" in html
    assert "Compute dial: capacity 1.0,0.0. Further thinking steps per token: 1.00" in html
    assert html.count('title="1 further step"') == 8  # of nine: the last is not read


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["Hi", "--prompts", "p.txt"], "a prompt and --prompts are given"),
        (["Hi", "--out", "texts.jsonl"], "--out needs --prompts"),
        (["--prompts", "p.txt", "--json"], "--json also needs --out FILE"),
        (["Hi", "--think-map", "no/folder.html"], "no/folder.html cannot be written"),
        (["Hi", "--stop", ""], "stop strings need a tokenizer, and none of them may be empty"),
        (["Hi", "--temperature", "-1"], "--temperature: must be at least 0, got -1"),
        (["Hi", "--capacity", "much"], "must be numbers such as 0.9,0.9,0, got 'much'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(
    made: Cli, options: list[str], said: str
) -> None:
    found = made("generate", "made", *options)
    assert found.status != 0
    assert found.out == ""
    assert said in found.err


def test_a_model_of_a_skill_cannot_write(cli: Cli) -> None:
    train = ["train", "tiny", "--data", SKILL, "--context", "8", "--batch-size", "2"]
    cli(*train, "--steps", "1", "--out", "run")
    found = cli("generate", "run/final", "Hi")
    assert (found.status, found.out) == (1, "")
    assert (
        found.err
        == "run/final has no tokenizer because it was not trained on text: it cannot write text\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_prompt_and_is_not_steered_by_the_text(
    made: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "made", "\x1b[2JHi\n", "--temperature", "2"]
    piped, screen = made(*command).out, Terminal()
    assert controls(piped)  # or the test would be too easy
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit):
        app(command)
    shown = screen.getvalue()
    assert shown.startswith("␛[2JHi\n")
    assert len(shown) == len("␛[2JHi\n") + len(piped)
    assert not controls(shown)


def controls(text: str) -> set[str]:
    return {letter for letter in text if ord(letter) < 32} - {"\n", "\t"}


def test_every_field_of_the_sampling_is_an_option(cli: Cli) -> None:
    text = cli("generate", "--help").out
    for name in Sampling.model_fields:
        assert f"  --{name.replace('_', '-')}" in text
