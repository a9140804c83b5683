"""The shipped specs have the same sizes, costs and names of parameters as before.

After an intended change run ``python -m tests.test_specs`` and check the diff of tests/golden.
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
    """Returns the total costs of a spec and its parameters, grouped by name without numbers."""
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
def test_a_spec_has_the_recorded_costs_and_parameters(name: str) -> None:
    assert facts(name) == (GOLDEN / f"{name}.txt").read_text()


def test_every_golden_file_belongs_to_a_spec() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_begins_with_a_description(name: str) -> None:
    header = re.match(r"(# .+\n)+", SPECS[name].read_text())
    assert header
    assert len(header[0]) > 60


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_is_read_back_from_its_yaml(name: str) -> None:
    spec = archdsl.load(name)
    assert parse_spec(parse(spec.to_yaml())) == spec


def test_all_specs_are_different_models() -> None:
    prints = {archdsl.load(name).fingerprint() for name in SPECS if name != "search"}
    assert len(prints) == len(SPECS) - ("search" in SPECS)


if __name__ == "__main__":
    for name in SPECS:
        (GOLDEN / f"{name}.txt").write_text(facts(name))
