"""Specs as data, and the error messages for wrong ones."""

from __future__ import annotations

import time
from typing import Any

import pytest

import archdsl
from archdsl.blocks.attention import AttentionSpec
from archdsl.errors import SpecError
from archdsl.lang.source import dump, parse
from archdsl.lang.spec import ModelSpec, parse_spec

SPEC = """\
name: example
vocab_size: 100
context: 64
dim: 32
blocks:
  - {kind: layer, attention: {head_size: 8}}
  - kind: loop
    steps: 3
    router: {kind: prefix, capacity: 0.7}
    body: {kind: layer, attention: {head_size: 8}}
"""


def read(text: str) -> ModelSpec:
    return parse_spec(parse(text, "my.yaml"))


def message_for(*changes: tuple[str, str]) -> str:
    """Returns the error message for SPEC with each old text replaced by the new one."""
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(SpecError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("steps: 3", "stepz: 3"),
            "my.yaml:8:12: blocks.1.stepz: unknown key (did you mean 'steps'?); known keys: kind, "
            "steps, full_steps, router, exit, residual, encoding, kv, parameters, injection, "
            "start, start_std, norm, norm_eps, body",
        ),
        (
            ("kind: prefix", "kind: prefx"),
            "my.yaml:9:20: blocks.1.router.kind: unknown kind 'prefx' of router "
            "(did you mean 'prefix'?); known kinds: "
            "all, predictor, prefix, random, threshold, top_k",
        ),
        (
            ("kind: prefix, ", ""),
            "my.yaml:9:13: blocks.1.router: no kind of router; "
            "known kinds: all, predictor, prefix, random, threshold, top_k",
        ),
        (
            ("{kind: prefix, capacity: 0.7}", "[0.7]"),
            "my.yaml:9:13: blocks.1.router: must be a mapping that names a kind of router "
            "(all, predictor, prefix, random, threshold, top_k), got a list",
        ),
        (
            ("kind: prefix", "kind: [prefix]"),
            "my.yaml:9:20: blocks.1.router.kind: unknown kind ['prefix'] of router "
            "(did you mean 'prefix'?); known kinds: "
            "all, predictor, prefix, random, threshold, top_k",
        ),
        (
            ("capacity: 0.7", "capacity: 1.5"),
            "my.yaml:9:38: blocks.1.router.capacity: must be at most 1, got 1.5",
        ),
        (
            ("capacity: 0.7", "capacity: [0.7, 0]"),
            "my.yaml:9:44: blocks.1.router.capacity.1: must be above 0, got 0",
        ),
        (
            ("capacity: 0.7", "capacity: {a: 1}"),
            "my.yaml:9:38: blocks.1.router.capacity: must be a number, got a mapping",
        ),
        (
            ("capacity: 0.7", f"capacity: [{', '.join(['0.5'] * 65)}]"),
            "my.yaml:9:38: blocks.1.router.capacity: takes at most 64 entries, got a list of 65",
        ),
        (
            ("dim: 32", "dim: 32.5"),
            "my.yaml:4:6: dim: must be a whole number, "
            "also written as 162M, 1.2B, 8k or 64KiB; got 32.5",
        ),
        (("dim: 32", "dim: true"), "my.yaml:4:6: dim: must be a whole number, got True"),
        (("dim: 32\n", ""), "my.yaml:1:1: dim: is required: width of the residual stream"),
        (
            ("dim: 32", "dim: 1e12"),
            "my.yaml:4:6: dim: must be at most 65536, got 1000000000000",
        ),
        (
            ("dim: 32", "dim: 10T"),
            "my.yaml:4:6: dim: must be at most 65536, got 10000000000000",
        ),
        (
            ("dim: 32", "dim: wide"),
            "my.yaml:4:6: dim: must be a whole number, also written as 162M, 1.2B, 8k or 64KiB; "
            "got 'wide'",
        ),
        (
            ("head_size: 8}}\n  - kind", "head_size: 3}}\n  - kind"),
            "my.yaml:6:42: blocks.0.attention.head_size: must be a multiple of 2, got 3",
        ),
        (
            ("head_size: 8}}\n  - kind", "head_size: 12}}\n  - kind"),
            "my.yaml:6:42: blocks.0.attention.head_size: must divide dim 32, got 12",
        ),
        (
            ("steps: 3", "steps: 3\n    kv: both"),
            "my.yaml:9:9: blocks.1.kv: must be 'own', 'shared', 'last' or 'all', got 'both'",
        ),
        (
            ("name: example", "name: my example"),
            r"my.yaml:1:7: name: must match ^[\w.+-]+$, got 'my example'",
        ),
        (
            ("name: example", "name: ''"),
            "my.yaml:1:7: name: must have at least 1 characters, got ''",
        ),
        (
            ("body: {kind: layer, attention: {head_size: 8}}", "body: null"),
            "my.yaml:10:11: blocks.1.body: must be a mapping, got nothing",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_errors_have_position_cause_and_correction(change: tuple[str, str], message: str) -> None:
    assert message_for(change) == message


def test_all_problems_are_reported_at_once_in_the_order_of_the_file() -> None:
    changes = [("vocab_size: 100", "vocab_size: 1"), ("steps: 3", "steps: many"), ("0.7", "7")]
    assert message_for(*changes, ("kind: layer", "kind: lair")).splitlines() == [
        "my.yaml:2:13: vocab_size: must be at least 2, got 1",
        "my.yaml:6:12: blocks.0.kind: unknown kind 'lair' of block (did you mean 'layer'?); "
        "known kinds: attention, feed_forward, layer, loop, moe, norm, stack",
        "my.yaml:8:12: blocks.1.steps: must be a whole number, got 'many'",
        "my.yaml:9:38: blocks.1.router.capacity: must be at most 1, got 7",
        "my.yaml:10:18: blocks.1.body.kind: unknown kind 'lair' of block (did you mean 'layer'?); "
        "known kinds: attention, feed_forward, layer, loop, moe, norm, stack",
    ]


def test_all_conflicts_between_values_are_reported_at_once() -> None:
    message = message_for(
        ("capacity: 0.7", "capacity: [0.2, 0.7], nested: true"), ("dim: 32", "dim: 30")
    )
    assert message.splitlines() == [
        "my.yaml:6:42: blocks.0.attention.head_size: must divide dim 30, got 8",
        "my.yaml:9:38: blocks.1.router.capacity: must not rise when nested, as all are shares "
        "of all tokens; got [0.2, 0.7]",
        "my.yaml:10:48: blocks.1.body.attention.head_size: must divide dim 30, got 8",
    ]


@pytest.mark.parametrize("text", ["- a", "just words", "3"])
def test_a_spec_is_a_mapping(text: str) -> None:
    with pytest.raises(SpecError, match=r"my\.yaml:1:1: a spec is a mapping"):
        read(text)


@pytest.mark.parametrize(
    "bomb",
    [
        {"kind": "stack", "repeat": 1024},
        {"kind": "loop", "steps": 64, "parameters": "per_step"},
        {"kind": "loop", "steps": 64},
        {"kind": "loop", "steps": 64, "router": {"kind": "prefix", "capacity": [0.5, 0.6] * 32}},
    ],
    ids=str,
)
def test_nested_repeats_are_refused_before_they_are_unrolled(bomb: dict[str, Any]) -> None:
    block: dict[str, Any] = {"kind": "norm"}
    for _ in range(20):
        block = bomb | {"body": [block] if bomb["kind"] == "stack" else block}
    tree = {"name": "bomb", "vocab_size": 2, "context": 2, "dim": 2, "blocks": [block]}
    start = time.process_time()
    with pytest.raises(SpecError, match=r"blocks.*at most 10,000"):
        read(dump(tree))
    assert time.process_time() - start < 2


def test_numbers_must_be_finite_also_in_python() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rope_theta"):
            AttentionSpec(rope_theta=value)


def test_sizes_may_have_units() -> None:
    spec = read(SPEC.replace("64", "4KiB").replace("vocab_size: 100", "vocab_size: 32k"))
    assert (spec.context, spec.vocab_size) == (4096, 32_000)


def test_an_empty_slot_may_be_written_as_null() -> None:
    plain = read(SPEC.replace("{kind: prefix, capacity: 0.7}", "null"))
    assert plain == read(SPEC.replace("    router: {kind: prefix, capacity: 0.7}\n", ""))


def test_a_spec_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(SPEC).dim = 64  # type: ignore[misc]


def test_a_patch_is_a_copy_and_is_validated() -> None:
    spec = read(SPEC)
    patched = spec.patch("blocks.1.router.capacity", [0.5, 0.25])
    assert spec == read(SPEC)
    assert patched == read(SPEC.replace("capacity: 0.7", "capacity: [0.5, 0.25]"))
    with pytest.raises(SpecError, match="head_size: must divide dim 33"):
        spec.patch("dim", 33)
    assert spec.patch("blocks.0.ffn.hidden", 48).to_yaml().count("hidden: 48") == 1


SAME = [
    ("name: example", "name: other\ndescription: about something"),
    ("name: example", "name: example\nbudget: {params: 1M}"),
    ("dim: 32\n", "dim: 32\ntie_embeddings: false\nnorm: rms\n"),
    ("- {kind: layer, attention: {head_size: 8}}", "- {attention: {head_size: 8}, kind: layer}"),
    ("head_size: 8", "head_size: 8, heads: 4"),
    ("head_size: 8}}\n  - kind", "head_size: 8}, ffn: {hidden: 96}}\n  - kind"),
    ("capacity: 0.7", "capacity: [0.7, 0.7]"),
    ("capacity: 0.7", "capacity: [0.7, 0.7, 0.1]"),
    ("capacity: 0.7", "capacity: 0.7, alpha: [1, 1.0]"),
    ("steps: 3", "steps: 3\n    full_steps: 1\n    kv: own\n    encoding: null"),
    (
        "- {kind: layer, attention: {head_size: 8}}",
        "- kind: stack\n    body:\n      - {kind: stack, body: [{kind: layer, attention: "
        "{head_size: 8}}]}",
    ),
    (
        "- {kind: layer, attention: {head_size: 8}}",
        "- {kind: loop, steps: 1, encoding: scale, body: {kind: layer, attention: {head_size: 8}}}",
    ),
]
OTHER = [
    ("dim: 32", "dim: 40"),
    ("context: 64", "context: 65"),
    ("dim: 32", "dim: 32\ntie_embeddings: true"),
    ("steps: 3", "steps: 4"),
    ("capacity: 0.7", "capacity: 0.6"),
    ("capacity: 0.7", "capacity: [0.7, 0.6]"),
    ("capacity: 0.7", "capacity: [1, 0.5]"),
    ("capacity: 0.7", "capacity: 0.7, gate: tanh"),
    ("kind: prefix", "kind: top_k"),
    ("kind: prefix, capacity: 0.7", "kind: all"),
    ("steps: 3", "steps: 3\n    residual: delta"),
    ("steps: 3", "steps: 3\n    encoding: scale"),
    ("steps: 3", "steps: 3\n    kv: shared"),
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change[1])
def test_specs_of_the_same_model_have_the_same_fingerprint(change: tuple[str, str]) -> None:
    assert read(SPEC.replace(*change)).fingerprint() == read(SPEC).fingerprint()


def test_specs_of_different_models_have_different_fingerprints() -> None:
    specs = [read(SPEC), *(read(SPEC.replace(*change)) for change in OTHER)]
    assert len({spec.fingerprint() for spec in specs}) == len(OTHER) + 1


def test_a_loop_over_every_token_has_one_fingerprint_however_it_is_written() -> None:
    every = [
        "router: null",
        "router: all",
        "router: {kind: random, capacity: 1}",
        "router: {kind: prefix, capacity: [1, 1.0]}",
        "router: null\n    full_steps: 3",
        "router: null\n    full_steps: 0",
        "router: null\n    residual: delta",
    ]
    prints = {
        read(SPEC.replace("router: {kind: prefix, capacity: 0.7}", text)).fingerprint()
        for text in every
    }
    assert len(prints) == 1


def test_the_kind_comes_first_in_yaml() -> None:
    assert "router: {kind: top_k, capacity: 0.7}" in archdsl.load("itt").to_yaml()
