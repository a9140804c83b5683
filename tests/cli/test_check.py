"""check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Cli

SMALL = """
name: small
vocab_size: 11
context: 8
dim: 16
blocks:
  - {kind: layer, attention: {head_size: 8}, ffn: {hidden: 24}}
  - kind: loop
    steps: 2
    router: {kind: top_k, capacity: 0.5}
    body: {kind: layer, attention: {head_size: 8}, ffn: {hidden: 24}}
"""
CAUSAL = ["--set", "blocks.1.router.kind=prefix"]


@pytest.fixture
def small(cli: Cli) -> Cli:
    Path("small.yaml").write_text(SMALL)
    return cli


def test_a_leak_is_status_1_and_is_named_below_the_table(small: Cli) -> None:
    found = small("check", "small.yaml")
    assert (found.status, found.err) == (1, "")
    first, _, header, model, *rest = found.out.splitlines()
    assert first.startswith("small: in float64, random weights, width 16, 8 tokens, 3 draws ")
    assert header.split() == ["change", "gradient", "decoding", "prefill", "padding"]
    assert (model.split()[0], model.split()[-1]) == ("model", "LEAK")
    assert any(
        line.startswith("blocks.1.body.attention") and line.endswith("PASS") for line in rest
    )
    named = "blocks.1, step 2 (router top_k): changing a later token moves earlier outputs by up to"
    assert any(line.startswith(named) for line in rest)
    assert any(
        line.startswith("note: decoding always chooses causally: its logits") for line in rest
    )
    assert rest[-1] == "small sees later tokens"
    assert max(len(line) for line in [header, model, *rest[:8]]) <= 80


def test_what_is_sound_is_status_0(small: Cli) -> None:
    found = small("check", "small.yaml", *CAUSAL)
    assert (found.status, found.err) == (0, "")
    last = "small is causal, and its outputs are the same however its tokens arrive"
    assert found.out.splitlines()[-1] == last


def test_json_has_the_same_facts(small: Cli) -> None:
    leaking = small("check", "small.yaml", "--json")
    assert (leaking.status, leaking.err, leaking.json["passed"]) == (1, "", False)
    [fault] = leaking.json["faults"]
    assert (fault["place"], fault["step"], fault["router"]) == ("blocks.1", 2, "top_k")
    assert fault["said"] in small("check", "small.yaml").out
    rows = {row["place"]: row for row in leaking.json["rows"]}
    assert (rows["blocks.1"]["kind"], rows["blocks.1"]["mark"]) == ("loop", "LEAK")
    assert rows["blocks.1"]["differences"]["decoding"] < 1e-13 < leaking.json["leaking_pass"]
    sound = small("check", "small.yaml", *CAUSAL, "--json")
    assert (sound.status, sound.json["passed"], sound.json["faults"]) == (0, True, [])


def test_a_checkpoint_is_tried_on_its_own_weights(small: Cli) -> None:
    assert small("build", "small.yaml", *CAUSAL, "--out", "made").status == 0
    found = small("check", "made")
    assert found.status == 0, found.err
    assert found.out.startswith("small: in float64, its own weights, width 16, 8 tokens, 3 draws")
    refused = small("check", "made", *CAUSAL)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == "made is a checkpoint, which --set cannot change: leave --set out\n"


@pytest.mark.parametrize(
    ("subject", "said"),
    [("nowhere", "no such file"), ("folder", "is a directory"), ("itt-overlay", "is an overlay")],
)
def test_what_is_neither_is_refused_in_words(small: Cli, subject: str, said: str) -> None:
    Path("folder").mkdir()
    found = small("check", subject)
    assert (found.status, found.out) == (2, "")
    assert said in found.err
