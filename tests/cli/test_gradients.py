"""gradients: the tables, the plot, JSON, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.checkpoint import save_checkpoint
from tests.cli.command import SKILL, Cli

DATA = ["--data", SKILL, "--context", "8", "--windows", "8"]


@pytest.fixture
def made(cli: Cli) -> str:
    cli("build", "tiny", "--set", "dim=16", "--out", "made")
    cli("build", "tiny", "--set", "dim=16", "--set", "blocks.1.steps=2", "--out", "fewer")
    return "made"


def test_tables_plot_and_json_hold_both_models(cli: Cli, made: str) -> None:
    pytest.importorskip("matplotlib")
    both = [made, "--before", "fewer", *DATA]
    found = cli("gradients", *both, "--plot", "norms.png", "--json")
    assert found.status == 0, found.err
    assert Path("norms.png").read_bytes()[1:4] == b"PNG"
    facts = found.json
    assert (facts["checkpoint"], facts["before_checkpoint"]) == ("made", "fewer")
    assert (facts["windows"], facts["group"], facts["context"]) == (8, 2, 8)
    steps = [
        [row["step"] for row in one["rows"] if row["layer"] == 1 and row["matrix"] == "q"]
        for one in (facts, facts["before"])
    ]
    assert steps == [[[1], [2], [3], None], [[1], [2], None]]
    shown = cli("gradients", *both)
    for text in ("1.3", "1.all", "before", "hard/easy", "normalised", "matched", "decile"):
        assert text in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    each = cli("gradients", made, *DATA, "--each").out
    assert "before" not in each
    assert all(len(line) <= 80 for line in each.splitlines())
    assert [line.split()[1] for line in each.splitlines() if line.startswith("1.3 ")] == list(
        "qkvo"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "no/a.png"], "no/a.png cannot be written"),
        (["--before", "nowhere"], "nowhere"),
        (["--before", "of-a-skill"], "made and of-a-skill have different tokenizers"),
        (["--context", "9999"], "a context of 9,999 tokens was requested"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    cli: Cli, made: str, options: list[str], message: str
) -> None:
    save_checkpoint("of-a-skill", build(load("tiny")), tokenizer_from=None, provenance={})
    found = cli("gradients", made, *DATA, *options)
    assert found.status == 1
    assert message in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""
