"""What stands in the way of serving engines is named, with the change that removes it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from typer.testing import CliRunner

from archdsl.checks.serving import obstacles
from archdsl.cli.app import app
from archdsl.interop.hf_export import in_transformers
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from tests.strategies import specs

SMALL = "{head_size: 8}"
WINDOW = "{head_size: 8, window: 4}"


@pytest.mark.parametrize(
    ("blocks", "path", "change"),
    [
        (
            f"{{kind: loop, router: prefix, body: {{kind: layer, attention: {SMALL}}}}}",
            "blocks.1.router",
            "blocks.1.router=null",
        ),
        (
            "{kind: layer, attention: {head_size: 8, window: 5}}",
            "blocks.1.attention.window",
            "blocks.1.attention.window=4",
        ),
        (
            "{kind: layer, attention: {head_size: 8, window: 1}}",
            "blocks.1.attention.window",
            "blocks.1.attention.window=4",
        ),
        (
            f"{{kind: loop, kv: all, body: {{kind: layer, attention: {SMALL}}}}}",
            "blocks.1.kv",
            "blocks.1.kv=own",
        ),
        ("{kind: layer, attention: {head_size: 16}}", "blocks.1.attention", None),
    ],
)
def test_each_obstacle_is_named_with_its_change(blocks: str, path: str, change: str | None) -> None:
    whole = f"blocks=[{{kind: layer, attention: {WINDOW}}}, {blocks}]"
    overrides = ["dim=32", whole]
    (found,) = obstacles(load("tiny", overrides=overrides))
    assert (found.path, found.change) == (path, change)
    if change is not None:
        assert obstacles(load("tiny", overrides=[*overrides, change])) == []


@settings(max_examples=30)
@given(spec=specs())
def test_what_has_no_obstacle_uses_transformers_own_attention(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = in_transformers(meta_model(spec))
    assert model.model.standard or obstacles(spec)


def test_the_command_names_the_nearest_servable_spec() -> None:
    run = CliRunner().invoke(app, ["check", "tiny", "--serving"])
    assert run.exit_code == 1
    assert 'archdsl build tiny --set "blocks.1.router=null"' in run.stdout
    words = ["check", "tiny", "--set", "blocks.1.router=null", "--serving"]
    assert CliRunner().invoke(app, words).exit_code == 0
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found == {"servable": True, "obstacles": []}
