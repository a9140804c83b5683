"""What every part promises, asked of all that are registered: a new kind is tested by existing.

The checks are those of `archdsl.testing`, for kinds from anywhere. Here each kind is also held
against its definition (tests/naive.py), and random specs against theirs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import archdsl
import tests.blocks
from archdsl import testing
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.registry import families
from archdsl.lang.source import parse
from archdsl.lang.spec import ModelSpec, parse_spec
from archdsl.model.build import meta_model
from archdsl.testing import built, checks, models, some_tokens
from tests import naive
from tests.strategies import specs

KINDS = [(kind, family) for family, kinds in families().items() for kind in kinds]
CHECKS = {
    f"{kind}-{name}": check
    for kind, family in KINDS
    for name, check in checks(kind, family).items()
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_agrees_with_its_definition(kind: str, family: str) -> None:
    for module in pkgutil.iter_modules(tests.blocks.__path__, "tests.blocks."):
        importlib.import_module(module.name)  # the definition of a kind may stand in its test
    for spec in models(families()[family][kind]).values():
        model, tokens_BT = built(spec), some_tokens(spec)
        naive.agree(model(tokens_BT), naive.model(model, tokens_BT), list(model.parameters()))


# The contract itself


@pytest.mark.parametrize(
    ("place", "name", "wrong", "says"),
    [
        ("blocks.norm.NormSpec", "cost", lambda self, bill: None, r"parameters: got \d+, expected"),
        (
            "blocks.norm.NormSpec",
            "footprint",
            lambda self, rows: archdsl.costs.activations.Footprint(),
            r"footprint\(\): 2,652 bytes too few; of 3 sequences of 13 tokens, autograd keeps .*",
        ),
        (
            "blocks.modules.norm.Norm",
            "forward",
            lambda self, x_BTD, ctx: self.norm(x_BTD).flip(1),
            "blocks.0: changing a later token moves earlier outputs",
        ),
        (
            "blocks.modules.norm.Norm",
            "reset",
            lambda self, rng, depth: self.norm.weight.fill_(torch.rand(())),
            "norm.weight differs between two models of one seed",
        ),
    ],
    ids=["cost", "footprint", "forward", "reset"],
)
def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, wrong: object, says: str
) -> None:
    monkeypatch.setattr(f"archdsl.{place}.{name}", wrong)
    with pytest.raises(AssertionError, match=f"(?s)norm: .*(?:{says})"):
        testing.contract("norm")


# Random specs


@settings(max_examples=15)
@given(specs())
def test_any_spec_costs_what_is_counted(spec: ModelSpec) -> None:
    costs_what_is_counted(spec)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_of_60_specs_costs_what_is_counted(spec: ModelSpec) -> None:
    costs_what_is_counted(spec)


@settings(max_examples=15)
@given(specs())
def test_any_spec_reads_back_and_means_its_canonical_form(spec: ModelSpec) -> None:
    reads_back_and_means_its_canonical_form(spec)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_of_60_specs_reads_back_and_means_its_canonical_form(spec: ModelSpec) -> None:
    reads_back_and_means_its_canonical_form(spec)


def costs_what_is_counted(spec: ModelSpec) -> None:
    model = meta_model(spec).eval()
    closed = sequence_cost(spec)
    assert closed.params == sum(p.numel() for p in model.parameters())
    assert closed.matrices == sum(p.numel() for n, p in model.named_parameters() if is_matrix(n, p))
    for tokens in {spec.context, 1}:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
        assert sequence_cost(spec, tokens=tokens).flops == counter.get_total_flops()


def reads_back_and_means_its_canonical_form(spec: ModelSpec) -> None:
    assert parse_spec(parse(spec.to_yaml())) == spec
    canonical = spec.canonical()
    assert canonical.canonical() == canonical
    assert canonical.fingerprint() == spec.fingerprint()

    model, same = built(spec), built(canonical)
    assert sequence_cost(canonical) == sequence_cost(spec)
    tokens_BT = torch.arange(2 * spec.context).view(2, -1) % spec.vocab_size
    # bare feed-forwards in loops in loops square their input until it overflows
    torch.testing.assert_close(
        model(tokens_BT), same(tokens_BT), rtol=1e-9, atol=1e-9, equal_nan=True
    )


def is_matrix(name: str, weight: nn.Parameter) -> bool:
    return weight.dim() == 2 and not name.endswith(("phi_SD", "e_SD"))  # those are vectors by step
