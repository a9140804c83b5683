"""Sizes: one syntax for every option that counts tokens, steps, bytes or parameters."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.main import get_command

from archdsl.cli.app import COMMANDS
from archdsl.cli.options import PLAIN
from archdsl.generation.sampling_config import Sampling
from archdsl.lang.config import check_config
from archdsl.lang.source import parse
from archdsl.search.config import SearchConfig
from archdsl.search.trials.proxy import Proxy
from archdsl.training.config import TrainConfig
from tests.cli.command import SKILL, Cli

# options that are named like a count of tokens, but count passes of a loop
PASSES = {("eval", "--steps"), ("generate", "--steps")}
COUNTED = {"steps", "tokens", "context", "budget", "flops", "kv", "memory", "limit", "top-k"}


def options(command: str) -> list[Any]:
    function, kind = COMMANDS[command]
    alone = typer.Typer(add_completion=False, **PLAIN)
    alone.command(command, cls=kind)(function)
    made = get_command(alone)
    with typer.Context(made, info_name=command) as ctx:
        return [option for option in made.get_params(ctx) if option.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_counts_takes_a_size_and_says_so(command: str) -> None:
    for option in options(command):
        name = option.opts[0]
        counts = COUNTED & {name[2:], name.rpartition("-")[2]} or name.endswith("-every")
        if counts and (command, name) not in PASSES:
            assert option.metavar == "SIZE", name


@pytest.mark.parametrize(
    ("kind", "text", "field", "value"),
    [
        (TrainConfig, "eval_tokens: 8k", "eval_tokens", 8000),
        (TrainConfig, "steps: 1.5k", "steps", 1500),
        (TrainConfig, "context: 4KiB", "context", 4096),
        (TrainConfig, "warmup_steps: 1k", "warmup_steps", 1000),
        (TrainConfig, "eval_every: 2k", "eval_every", 2000),
        (TrainConfig, "checkpoint_every: 1e3", "checkpoint_every", 1000),
        (Sampling, "max_tokens: 1k", "max_tokens", 1000),
        (SearchConfig, "budget: 162M", "budget", 162_000_000),
        (SearchConfig, "train_flops: 1P", "train_flops", 10**15),
    ],
)
def test_settings_take_sizes(kind: Any, text: str, field: str, value: int) -> None:
    assert getattr(check_config(kind, parse(text, "config.yaml")), field) == value


def test_a_proxy_takes_sizes() -> None:
    proxy = Proxy.parse("dim=64,steps=1.2k")
    assert proxy.tasks["text"].rungs[-1] == 1200
    assert proxy.dim == 64


def test_options_take_sizes_and_their_errors_say_the_syntax(cli: Cli) -> None:
    small = ["train", "tiny", "--data", SKILL, "--set", "context=16", "--out", "run"]
    done = cli(*small, "--steps", "0.002k", "--eval-tokens", "1k", "--context", "16", "--json")
    assert done.json["steps"] == 2
    for option in ("--steps", "--eval-tokens", "--context", "--checkpoint-every"):
        wrong = cli(*small, option, "8Q")
        assert (wrong.status, wrong.out) == (2, "")
        assert f"{option}: must be a whole number, also written as 162M, 1.2B, 8k" in wrong.err
