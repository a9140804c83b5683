"""Gradients of attention matrices: steps add up to the weight's, controls do what they say."""

from __future__ import annotations

import re
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archdsl.data.loading import load_data
from archdsl.data.types import IGNORE, Batch
from archdsl.errors import ArchdslError
from archdsl.evaluation.evaluate import cross_entropy
from archdsl.evaluation.gradient_sample import (
    CALIPER,
    choose_sample,
    deciles,
    matched_tokens,
    pairs_of_equal_loss,
)
from archdsl.evaluation.gradients import Gradients, contrasts, gradients, spikes
from archdsl.evaluation.weight_gradients import (
    MATRICES,
    Use,
    nuclear_norm,
    recorded,
    weight_gradient,
    window_norms,
)
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel
from archdsl.testing import randomise

SKILL = load_data("skill:p-hop,hops=1,length=16,alphabet=4")
SMALL = ["dim=32", "vocab_size=11", "context=24"]
LOOP = [*SMALL, "blocks.1.router=null"]


def model(name: str = "tiny", *overrides: str) -> LanguageModel:
    made = build(load(name, overrides=overrides), dtype=torch.float64).eval()
    randomise(made)
    return made


def batch(windows: int = 3, tokens: int = 24) -> Batch:
    text_BT = torch.randint(11, (windows, tokens + 1), generator=torch.Generator().manual_seed(1))
    return Batch(text_BT[:, :-1], text_BT[:, 1:])


def losses(of: LanguageModel, given: Batch) -> Tensor:
    return cross_entropy(of(given.tokens_BT), given.targets_BT)


@pytest.mark.parametrize(
    "name",
    ["tiny", "mor-lora-tiny", "cotformer-tiny", "ouro-tiny", "huginn-tiny", "moeut-tiny"],
)
def test_the_gradients_of_all_uses_add_up_to_that_of_the_weight(name: str) -> None:
    made = model(name, "vocab_size=11", "context=24")
    with recorded(made) as uses:
        loss = losses(made, batch()).sum()
    products = list(uses.values())
    outputs = [product.y_BKO for product in products]
    slopes = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
    sums: dict[Tensor, Tensor] = {}
    for product, slope in zip(products, slopes, strict=True):
        here = weight_gradient(product.x_BKI, slope).sum(0)
        weight = product.linear.weight
        sums[weight] = sums[weight] + here if weight in sums else here
    whole = torch.autograd.grad(loss, list(sums))
    assert len(products) > len(sums)  # some weight has several uses
    for found, expected in zip(sums.values(), whole, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [24, 48])  # fewer than the 32 channels, and more
def test_norms_are_those_of_a_model_whose_steps_have_weights_of_their_own(tokens: int) -> None:
    shared = model("tiny", *LOOP, "context=48")
    own = model("tiny", *LOOP, "context=48", "blocks.1.parameters=per_step")
    weights, names = shared.state_dict(), own.state_dict()
    own.load_state_dict({n: weights[re.sub(r"bodies\.\d", "bodies.0", n)] for n in names})
    given = batch(tokens=tokens)
    weight_JBT = torch.rand(2, 3, tokens, generator=torch.Generator().manual_seed(2)).double()
    norms = window_norms(shared, given, weight_JBT)
    for j, weight_BT in enumerate(weight_JBT):
        for b in range(3):
            one = Batch(given.tokens_BT[b : b + 1], given.targets_BT[b : b + 1])
            own.zero_grad()
            (losses(own, one) * weight_BT[b]).sum().backward()
            whole = dict.fromkeys(MATRICES, 0.0)
            steps = dict(own.loops[0].bodies.named_parameters())
            for step in (1, 2, 3):
                for matrix in MATRICES:
                    grad: Any = steps[f"{step - 1}.attention.{matrix}.weight"].grad
                    expected = np.linalg.svd(grad, compute_uv=False).sum()
                    found = float(norms.nuclear[Use(1, (step,), matrix)][j, b])
                    assert found == pytest.approx(expected, rel=1e-9)
                    whole[matrix] = whole[matrix] + grad
            for matrix in MATRICES:
                expected = np.linalg.svd(whole[matrix], compute_uv=False).sum()
                found = float(norms.nuclear[Use(1, None, matrix)][j, b])
                assert found == pytest.approx(expected, rel=1e-9)


def test_a_loss_that_is_multiplied_has_the_same_normalised_norms() -> None:
    made = model("tiny", *SMALL)
    weight_BT = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)).double()
    norms = window_norms(made, batch(), torch.stack([weight_BT, 1000 * weight_BT]))
    assert norms.at_logits_JB[0].min() > 0
    for norm_JB in norms.nuclear.values():
        torch.testing.assert_close(norm_JB[1], 1000 * norm_JB[0])
        plain, scaled = norm_JB / norms.at_logits_JB
        torch.testing.assert_close(plain, scaled)


def test_the_norm_at_the_logits_is_that_of_the_probabilities_minus_the_target() -> None:
    made = model("tiny", *SMALL)
    given, weight_BT = batch(), torch.rand(3, 24).double()
    at = made(given.tokens_BT).softmax(-1)
    at = (at - torch.nn.functional.one_hot(given.targets_BT, 11)) * weight_BT.unsqueeze(-1)
    found = window_norms(made, given, weight_BT[None]).at_logits_JB[0]
    torch.testing.assert_close(found, at.flatten(1).norm(dim=1).detach())


def test_frozen_weights_are_measured_as_well() -> None:
    made, given, weight_JBT = model("tiny", *SMALL), batch(), torch.ones(1, 3, 24)
    norms = window_norms(made, given, weight_JBT).nuclear
    made.requires_grad_(False)
    for use, norm_JB in window_norms(made, given, weight_JBT).nuclear.items():
        torch.testing.assert_close(norm_JB, norms[use])


def test_deciles_divide_the_tokens_by_their_loss() -> None:
    loss_WT = np.random.default_rng(0).exponential(size=(7, 9)).round(1)  # with equal losses
    loss_WT[2, 3:] = np.nan
    found = deciles(loss_WT)
    assert ((found == -1) == np.isnan(loss_WT)).all()
    groups = [loss_WT[found == number] for number in range(10)]
    assert sum(map(len, groups)) == 57
    assert {len(group) for group in groups} == {5, 6}
    for low, high in pairwise(groups):
        assert low.max() <= high.min()
    drawn_JWT = choose_sample([], loss_WT, "data").drawn_JWT
    for number, drawn_WT in enumerate(drawn_JWT):
        assert (found[drawn_WT] == number).all()
        assert (drawn_WT.sum(1) == (found == number).any(1)).all()


def test_as_many_tokens_as_possible_are_matched_and_each_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        easy, hard = rng.uniform(1, 1.4, 5), rng.uniform(1, 1.4, 6)
        easy[rng.integers(5)] = np.nan
        first, second = pairs_of_equal_loss(easy, hard)
        assert len(set(first)) == len(set(second)) == len(first)
        gaps = np.abs(easy[first] - hard[second])
        assert (gaps <= CALIPER * np.maximum(easy[first], hard[second])).all()
        equal = np.abs(easy[:, None] - hard) <= CALIPER * np.maximum(easy[:, None], hard)
        most = max(
            sum(equal[i, j] for i, j in enumerate(places)) for places in permutations(range(6), 5)
        )
        assert len(first) == most


def test_easy_and_hard_windows_are_quarters_and_matched_tokens_lie_in_their_pairs() -> None:
    loss_WT = np.random.default_rng(1).exponential(size=(9, 30)) * np.arange(1, 10)[:, None]
    sample = choose_sample([], loss_WT, "data")
    means = loss_WT.mean(1)
    assert len(sample.easy) == len(sample.hard) == 2
    others = np.delete(means, [*sample.easy, *sample.hard])
    assert means[sample.easy].max() <= others.min() <= others.max() <= means[sample.hard].min()
    counts_W = matched_tokens(sample, loss_WT).sum(1)
    assert (counts_W[sample.easy] == counts_W[sample.hard]).all()
    assert counts_W.sum() == 2 * counts_W[sample.easy].sum() > 0


def test_a_spike_is_above_both_neighbours_in_almost_all_resamples() -> None:
    noise_WL = np.random.default_rng(0).uniform(0.9, 1.1, (12, 6))
    found = spikes(noise_WL * [9, 1, 2, 1, 1.01, 1])  # the first has one neighbour
    assert [spike.layer for spike in found] == [2]
    assert 1.8 < found[0].height.low < found[0].height.value < found[0].height.high < 2.2
    assert spikes(noise_WL[:, :2]) == ()


@pytest.mark.parametrize("parameters", ["shared", "per_step"])
def test_the_steps_of_a_spike_are_taken_together(parameters: str) -> None:
    layer = "{kind: layer, attention: {head_size: 16}, ffn: {hidden: 32}}"
    loop = f"{{kind: loop, steps: 2, parameters: {parameters}, body: {layer}}}"
    made = model("tiny", *SMALL, f"blocks=[{layer}, {loop}, {layer}]")
    for number in (0, 2):  # what the outer layers read is small, and so are their gradients
        torch.nn.init.constant_(made.get_parameter(f"blocks.{number}.attention_norm.weight"), 0.01)
    found = gradients(made, SKILL, windows=8, context=16)
    places = ["0", "1.all", "2"] if parameters == "shared" else ["0", "1.1", "1.2", "2"]
    raw = {row.use.place: row.raw for row in found.rows if row.matrix == "all"}
    for group, spiking in (("easy", found.spikes.easy), ("hard", found.spikes.hard)):
        first, *steps, last = [getattr(raw[place], group).value for place in places]
        [spike] = spiking
        assert spike.layer == 1
        assert spike.height.value == pytest.approx(sum(steps) / max(first, last))


def test_pairs_of_windows_are_drawn_together() -> None:
    norm_WC = np.random.default_rng(0).exponential(size=(4, 1))
    norm_WC = np.concatenate([norm_WC, 3 * norm_WC])
    easy, hard = np.arange(4), np.arange(4, 8)
    [paired], [alone] = contrasts(norm_WC, easy, hard, paired=True), contrasts(norm_WC, easy, hard)
    assert paired.ratio is not None
    assert alone.ratio is not None
    assert paired.ratio.low == pytest.approx(paired.ratio.high) == pytest.approx(3)
    assert alone.ratio.low < 2.5 < 3.5 < alone.ratio.high


@pytest.fixture(scope="module")
def measured() -> Gradients:
    return gradients(trained(), SKILL, windows=16, context=16, before=plain())


def trained() -> LanguageModel:
    return model("tiny", *SMALL).train()


def plain() -> LanguageModel:
    return model("tiny", *LOOP, "blocks.1.steps=1")


def test_rows_are_layers_and_steps_of_both_models(measured: Gradients) -> None:
    places = dict.fromkeys(row.use.place for row in measured.rows)
    assert list(places) == ["0", "1.1", "1.2", "1.3", "1.all"]
    assert measured.before is not None
    assert list(dict.fromkeys(row.use.place for row in measured.before.rows)) == ["0", "1"]
    assert [row.matrix for row in measured.rows[:5]] == ["all", *MATRICES]
    raw = {row.use: row.raw.hard.value for row in measured.rows}
    assert raw[Use(0, (), "all")] == pytest.approx(sum(raw[Use(0, (), m)] for m in MATRICES))
    steps = [value for use, value in raw.items() if use.matrix == "all" and use.step is not None]
    assert measured.total.raw.hard.value == pytest.approx(sum(steps))


def test_the_figures_are_means_over_windows(measured: Gradients) -> None:
    made = trained().eval()
    [given] = SKILL.held_out("validation", 16, 16, 16 * 16)
    loss_WT, other_WT = (
        losses(one, given).detach().masked_fill(given.targets_BT == IGNORE, torch.nan).numpy()
        for one in (made, plain())
    )
    sample = choose_sample([given], (loss_WT + other_WT) / 2, "data")
    chosen = [~np.isnan(loss_WT), matched_tokens(sample, loss_WT), *sample.drawn_JWT]
    weights = [torch.from_numpy(one / one.sum(1, keepdims=True).clip(1)) for one in chosen]
    norms = window_norms(made, given, torch.stack(weights))
    norm_JW, at_JW = norms.nuclear[Use(1, (2,), "v")].numpy(), norms.at_logits_JB.numpy()
    [row] = [row for row in measured.rows if row.use == Use(1, (2,), "v")]
    assert row.matched is not None
    normalised_W = norm_JW[0] / at_JW[0]
    for group, raw, normalised, matched in (
        (sample.easy, row.raw.easy, row.normalised.easy, row.matched.easy),
        (sample.hard, row.raw.hard, row.normalised.hard, row.matched.hard),
    ):
        assert raw.value == pytest.approx(norm_JW[0, group].mean())
        assert normalised.value == pytest.approx(normalised_W[group].mean())
        assert matched.value == pytest.approx(norm_JW[1, group].mean())
    for number, drawn_WT in enumerate(sample.drawn_JWT):
        there_W = drawn_WT.any(1)
        token_W = norm_JW[2 + number, there_W]
        assert row.tokens[number].value == pytest.approx(token_W.mean())
        normalised_W = token_W / at_JW[2 + number, there_W]
        assert row.tokens_normalised[number].value == pytest.approx(normalised_W.mean())


def test_ratios_lie_in_their_intervals_and_losses_of_groups_differ(measured: Gradients) -> None:
    row = measured.rows[0]
    for contrast in (row.raw, row.normalised, row.matched):
        assert contrast is not None
        assert contrast.ratio is not None
        ratio = contrast.hard.value / contrast.easy.value
        assert contrast.ratio.low <= contrast.ratio.value <= contrast.ratio.high
        assert contrast.ratio.value == pytest.approx(ratio)
    matched = measured.loss_of_matched
    assert matched is not None
    assert abs(matched.easy - matched.hard) <= CALIPER * max(matched.easy, matched.hard)
    assert measured.loss_of_groups.hard > measured.loss_of_groups.easy


def test_a_model_is_as_it_was_and_compared_with_itself_it_is_equal() -> None:
    made = trained()
    state = torch.get_rng_state()
    found = gradients(made, SKILL, windows=4, context=16, before=made, batch_size=3)
    assert made.training
    assert torch.equal(torch.get_rng_state(), state)
    assert found.before == found.model_copy(update={"before": None})


@pytest.mark.parametrize(
    ("overrides", "windows", "message"),
    [
        (["blocks.0={kind: feed_forward}", "blocks.1={kind: feed_forward}"], 8, "has no attention"),
        ([], 2, "gives 2 windows with .* targets in all: at least 4 windows and 10 targets"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    overrides: list[str], windows: int, message: str
) -> None:
    with pytest.raises(ArchdslError, match=message):
        gradients(model("tiny", *SMALL, *overrides), SKILL, windows=windows, context=16)


def test_a_model_whose_loss_is_not_finite_is_refused() -> None:
    made = model("tiny", *SMALL)
    torch.nn.init.constant_(made.head.weight, torch.inf)
    with pytest.raises(ArchdslError, match="the loss of tiny is not finite"):
        gradients(made, SKILL, windows=4, context=16)


def test_a_step_that_no_token_takes_has_no_gradient() -> None:
    x, none = torch.randn(2, 0, 4), torch.randn(2, 0, 3)
    assert nuclear_norm(x, none).tolist() == [0, 0]
