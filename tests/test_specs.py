"""The shipped specs are what they were: sizes, costs and names of parameters.

After a change that is meant: ``python -m tests.test_specs``, and read the diff of tests/golden.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import archdsl
from archdsl.costs.receipt import cost, paper_flops
from archdsl.lang.source import parse, shipped_specs
from archdsl.lang.spec import parse_spec
from archdsl.model.build import meta_model

GOLDEN = Path(__file__).parent / "golden"
SPECS = shipped_specs()


def facts(name: str) -> str:
    """Totals of a spec, then its parameters; of those that only differ in numbers, how many."""
    spec = archdsl.load(name)
    receipt = cost(spec)
    lines = [
        f"parameters {receipt.params:,}",
        f"in matrices {receipt.matrices:,}",
        f"FLOPs per {receipt.context} tokens {receipt.flops_per_context:,}",
        f"FLOPs per token {receipt.lightest:,.0f} {receipt.expected:,.0f} {receipt.heaviest:,.0f}",
        f"TFLOPs as the paper counts {paper_flops(spec) / 1e12:.2f}",
        f"KV bytes per token {receipt.kv_bytes_per_token:,.1f}",
        "",
    ]
    weights = Counter(
        (re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", path)), tuple(weight.shape))
        for path, weight in meta_model(spec).named_parameters()
    )
    for (path, shape), count in weights.items():
        lines.append(f"{count:3} x {path} {' x '.join(map(str, shape))}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", SPECS)
def test_is_what_it_was(name: str) -> None:
    assert facts(name) == (GOLDEN / f"{name}.txt").read_text()


def test_nothing_golden_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_says_at_its_head_what_it_is(name: str) -> None:
    header = re.match(r"(# .+\n)+", SPECS[name].read_text())
    assert header
    assert len(header[0]) > 60


@pytest.mark.parametrize("name", SPECS)
def test_reads_back_from_its_own_yaml(name: str) -> None:
    spec = archdsl.load(name)
    assert parse_spec(parse(spec.to_yaml())) == spec


def test_no_two_are_the_same_model() -> None:
    prints = {archdsl.load(name).fingerprint() for name in SPECS if name != "search"}
    assert len(prints) == len(SPECS) - ("search" in SPECS)


if __name__ == "__main__":
    for name in SPECS:
        (GOLDEN / f"{name}.txt").write_text(facts(name))
