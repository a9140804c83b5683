"""What every part promises, asked of all that are registered: a new kind is tested by existing.

Blocks stand in a model as they are; routers, residuals and encodings stand in the slot of a loop,
rotary scalings in that of attention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import archdsl
from archdsl.checks.check import check
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.registry import families
from archdsl.lang.source import parse
from archdsl.lang.spec import ModelSpec, parse_spec, walk
from archdsl.model.build import meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from tests import naive
from tests.strategies import specs

D, V, T = 16, 11, 13
LAYER = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
PREFIX = {"kind": "prefix", "capacity": [0.7, 0.4]}


def in_a_model(family: str, example: Any) -> ModelSpec:
    loop = {"kind": "loop", "steps": 3, "router": PREFIX, "residual": "thinking", "body": LAYER}
    block = example if family == "block" else loop | {family: example}
    if family == "rope_scaling":
        block = {"kind": "attention", "head_size": 8, family: example}
    fields = {"name": "example", "vocab_size": V, "context": T, "dim": D, "blocks": [block]}
    return ModelSpec.model_validate(fields)


EXAMPLES = {
    f"{family}-{kind}": (family, part)
    for family, kinds in families().items()
    for kind, part in kinds.items()
}


@pytest.fixture(params=EXAMPLES, ids=str)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    family, part = EXAMPLES[request.param]
    return in_a_model(family, part.example)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_example_is_of_its_kind_and_says_what_it_is_for(name: str) -> None:
    family, part = EXAMPLES[name]
    assert part.example["kind"] == part.model_fields["kind"].default
    assert part.family == family
    assert part.__doc__
    silent = [
        n for n, f in part.model_fields.items() if n not in ("kind", "body") and not f.description
    ]
    assert name == "router-all" or not silent


def test_reads_back_from_yaml_as_it_was(spec: ModelSpec) -> None:
    again = parse_spec(parse(spec.to_yaml()))
    assert again == spec
    assert again.to_yaml() == spec.to_yaml()


def test_costs_what_is_counted(spec: ModelSpec) -> None:
    costs_what_is_counted(spec)


def test_keeps_the_shape(spec: ModelSpec) -> None:
    model = built(spec)
    for tokens in (1, T):
        x_BTD = torch.randn(2, tokens, D, dtype=torch.float64)
        for block in model.blocks:
            assert block(x_BTD, Context()).shape == x_BTD.shape


def test_agrees_with_its_definition(spec: ModelSpec) -> None:
    model = built(spec)
    tokens_BT = some_tokens()
    naive.agree(model(tokens_BT), naive.model(model, tokens_BT), list(model.parameters()))


def test_every_weight_learns(spec: ModelSpec) -> None:
    model = built(spec).train()
    loss = model(some_tokens()).square().mean()
    torch.stack([loss, *model.trace.losses.values()]).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), f"{name} gets no gradient"


def test_equal_seeds_give_equal_bits(spec: ModelSpec) -> None:
    one, same, other = (archdsl.build(spec, seed=seed) for seed in (1, 1, 2))
    tokens_BT = some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert one(tokens_BT).equal(same(tokens_BT))
    assert not one(tokens_BT).equal(other(tokens_BT))


def test_every_weight_gets_an_initial_value(spec: ModelSpec) -> None:
    model = meta_model(spec).to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
        model.initialise(0)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name


def test_is_sound_or_is_caught_leaking(spec: ModelSpec) -> None:
    says_so = any(getattr(part, "leaks", False) for _, part in walk(spec))
    report = check(spec, seeds=2)
    assert report.faults == report.leaks
    assert bool(report.faults) == says_so
    assert all(fault.difference for fault in report.faults)


def test_says_that_it_leaks_but_for_causal_routing(spec: ModelSpec) -> None:
    says_so = any(getattr(part, "leaks", False) for _, part in walk(spec))
    model = built(spec)
    assert model.leaks == says_so
    with model.causal_routing():
        assert not model.leaks
    assert model.leaks == says_so


def test_a_decoder_that_starts_over_for_each_token_agrees_with_one_pass(spec: ModelSpec) -> None:
    model, tokens_BT = built(spec), some_tokens()
    with model.causal_routing():
        last = [model(tokens_BT[:, :length])[:, -1] for length in range(1, T + 1)]
        torch.testing.assert_close(model(tokens_BT), torch.stack(last, 1), rtol=1e-9, atol=1e-9)


def test_a_sequence_does_not_depend_on_its_neighbours(spec: ModelSpec) -> None:
    model, tokens_BT = built(spec), some_tokens(3)
    alone = torch.cat([model(row_T.unsqueeze(0)) for row_T in tokens_BT])
    torch.testing.assert_close(model(tokens_BT), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "bfloat16"])
def test_runs_in_half_precision(spec: ModelSpec, half: bool) -> None:
    model = archdsl.build(spec, dtype=torch.bfloat16 if half else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=not half):
        logits = model(some_tokens())
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert logits.isfinite().all()


@settings(max_examples=30)
@given(specs())
def test_any_spec_costs_what_is_counted(spec: ModelSpec) -> None:
    costs_what_is_counted(spec)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_of_200_specs_costs_what_is_counted(spec: ModelSpec) -> None:
    costs_what_is_counted(spec)


@settings(max_examples=20)
@given(specs())
def test_any_spec_reads_back_and_means_its_canonical_form(spec: ModelSpec) -> None:
    reads_back_and_means_its_canonical_form(spec)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_of_200_specs_reads_back_and_means_its_canonical_form(spec: ModelSpec) -> None:
    reads_back_and_means_its_canonical_form(spec)


def costs_what_is_counted(spec: ModelSpec) -> None:
    model = meta_model(spec)
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


def built(spec: ModelSpec) -> LanguageModel:
    """The model with weights far from their initial values, in float64, as it is used."""
    model = archdsl.build(spec)
    naive.randomise(model)
    return model.eval()


def some_tokens(batch: int = 2) -> Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(5))
