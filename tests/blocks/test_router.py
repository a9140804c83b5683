"""Routers: which tokens they select, seen from the side of a decoder that gets one at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import archdsl
from archdsl.blocks.modules.router import ScoreRouter, budgets, higher_before, within_budget
from archdsl.blocks.modules.threshold import MOMENTUM, Predictor, Threshold, TopK
from archdsl.blocks.router import PrefixSpec, RandomSpec, RouterSpec, share_of
from archdsl.blocks.threshold import PredictorSpec, ThresholdSpec, TopKSpec
from archdsl.nn.block import Context
from archdsl.nn.cache import Cache, Stream
from archdsl.nn.gather import take
from archdsl.nn.loop import Pass, Step
from tests import naive

D = 6
RUN_AWAY = [[float(t) for t in range(13)], [-float(t) for t in range(13)], [1.0] * 13]

# few distinct values, so that ties are common
scores = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.1, 3.0]), min_size=1, max_size=17)
capacities = st.sampled_from([0.01, 0.125, 0.3, 1 / 3, 0.5, 0.6000000000000001, 0.7, 0.9, 0.999])


@given(scores, capacities, st.data())
def test_prefix_selects_what_a_decoder_with_a_sorted_list_selects(
    values: list[float], capacity: float, data: st.DataObject
) -> None:
    left = data.draw(st.sets(st.integers(0, len(values) - 1)))
    score_BT = torch.tensor([values]).double()
    score_BT[0, [t for t in range(len(values)) if t not in left]] = -math.inf
    wanted = naive.prefix(list(torch.tensor(values).double()), capacity, left)
    assert selected(*prefix_share(score_BT, capacity)) == [
        naive.within_budget(wanted, capacity, len(values))
    ]


@given(st.lists(st.booleans(), min_size=1, max_size=17), capacities)
def test_a_budget_allows_one_token_at_a_time_what_it_allows_all_at_once(
    wanted: list[bool], capacity: float
) -> None:
    wanted_BT = torch.tensor([wanted])
    budget_BT = budgets(capacity, torch.arange(len(wanted)).unsqueeze(0))
    one_by_one, taken_B = [], torch.zeros(1, dtype=torch.long)
    for one_B1, budget_B1 in zip(wanted_BT.split(1, 1), budget_BT.split(1, 1), strict=True):
        one_by_one.append(within_budget(one_B1, budget_B1, taken_B))
        taken_B = taken_B + one_by_one[-1].sum(1)
    assert torch.equal(torch.cat(one_by_one, 1), within_budget(wanted_BT, budget_BT))


@pytest.mark.parametrize("rows", [1, 2, 5, 256])
def test_counts_of_higher_scores_do_not_depend_on_how_they_are_sliced(rows: int) -> None:
    score_BT = torch.randn(3, 13).round(decimals=1)
    want = [[sum(a > s for a in row[:t]) for t, s in enumerate(row)] for row in score_BT.tolist()]
    for sorts in (True, False):
        assert higher_before(score_BT, rows, sorts).tolist() == want


@pytest.mark.parametrize("capacity", [0.01, 0.3, 0.5, 0.7, 0.9])
def test_prefix_keeps_its_budget_at_every_prefix(capacity: float) -> None:
    score_BT = torch.cat([torch.tensor(RUN_AWAY), torch.randn(20, 13)])
    for row in selected(*prefix_share(score_BT, capacity)):
        for length in range(1, 14):
            assert sum(t < length for t in row) <= share_of(capacity, length)


def test_prefix_spends_all_its_budget_on_rising_scores() -> None:
    for length in range(1, 14):
        row = selected(*prefix_share(torch.tensor(RUN_AWAY[:1])[:, :length], 0.4))[0]
        assert len(row) == share_of(0.4, length)


@pytest.mark.parametrize("capacity", [0.125, 0.5, 0.7])
def test_the_share_that_is_selected_is_close_to_the_capacity(capacity: float) -> None:
    T = 1024
    _, keep_BK = prefix_share(torch.randn(64, T), capacity)
    # the budget cuts off the chance upward swings, on average this much of them
    cut = math.sqrt(2 * capacity * (1 - capacity) / (math.pi * T))
    assert keep_BK.sum().item() / (64 * T) == pytest.approx(capacity - cut, abs=0.004)


@given(scores, capacities)
def test_top_k_selects_what_sorting_selects(values: list[float], capacity: float) -> None:
    distinct = [value + t / 1000 for t, value in enumerate(values)]
    router = TopKSpec(capacity=(capacity,)).build(D, [0])
    index_BK, keep_BK, _ = select(router, torch.tensor([distinct]), capacity)
    assert keep_BK is None
    assert index_BK.tolist() == [
        naive.top_k(list(torch.tensor(distinct)), capacity, set(range(len(values))))
    ]


@pytest.mark.parametrize(
    ("capacity", "tokens", "kept"),
    [
        (0.6000000000000001, 5, 3),
        (0.30000000000000004, 10, 3),
        (0.7, 10, 7),
        (0.5, 5, 3),
        (0.001, 7, 1),
        (0.999, 7, 7),
    ],
)
def test_a_share_of_the_tokens_is_rounded_and_never_empty(
    capacity: float, tokens: int, kept: int
) -> None:
    assert share_of(capacity, tokens) == kept
    assert TopKSpec(capacity=(capacity,)).tokens(tokens, 0) == kept
    assert prefix_share(torch.randn(1, tokens), capacity)[0].size(1) == kept


@pytest.mark.parametrize("kind", [TopKSpec, PrefixSpec, ThresholdSpec, PredictorSpec, RandomSpec])
def test_entries_are_distinct_and_the_selected_ones_come_first_and_in_order(
    kind: type[RouterSpec],
) -> None:
    choice = built(kind(capacity=(0.6,)))(naive.stream(5, 13, D), at(0.6), Context(), None)
    rows = selected(choice.index_BK, choice.keep_BK)
    for index, kept in zip(choice.index_BK.tolist(), rows, strict=True):
        assert len(set(index)) == len(index) == 8
        assert index[: len(kept)] == sorted(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [TopKSpec, PrefixSpec, ThresholdSpec, PredictorSpec, RandomSpec])
def test_one_token_at_a_time_selects_what_all_at_once_select(
    kind: type[RouterSpec], dtype: torch.dtype
) -> None:
    router = built(kind(capacity=(0.5,))).to(dtype).eval()
    router.causal.append(None)
    x_BTD = naive.stream(1, 48, D).round(decimals=1).to(dtype)  # ties are common
    active_BT, real_BT = torch.rand(2, 1, 48) < 0.9
    for capacity in (0.2, 0.5, 0.6, 1.0):
        whole = router(x_BTD[:, real_BT[0]], at(capacity), Context(), active_BT[:, real_BT[0]])
        keep_BK = torch.ones_like(whole.index_BK) > 0 if whole.keep_BK is None else whole.keep_BK
        cache, places, scores = Cache(48), [], []
        for t in range(48):
            stream = cache.stream(1, real_BT[:, t].long())
            ctx = Context(stream, cache=cache, kept=cache.of_layer(""))
            x_11D = x_BTD[:, t : t + 1]
            skips = router.skips(x_11D, [Pass(1, 1, at(capacity))], ctx)
            one = router(x_11D, at(capacity), replace(ctx, path=(1,)), active_BT[:, t : t + 1])
            if active_BT[0, t] and real_BT[0, t]:
                assert skips == (isinstance(router, Threshold) and one.index_BK.size(1) == 0)
            places += [cache.length] * one.index_BK.size(1)
            scores += [] if one.score_BK is None else [one.score_BK]
            cache.move(stream.after(1))
        assert places == whole.index_BK[keep_BK].tolist()
        assert whole.score_BK is not None
        torch.testing.assert_close(torch.cat(scores, 1), whole.score_BK[keep_BK].unsqueeze(0))


@pytest.mark.parametrize("kind", ["threshold", "predictor", "prefix", "random"])
@pytest.mark.parametrize("unselected", ["bypass", "literal"])
def test_a_loop_that_skips_passes_decodes_what_one_pass_computes(
    kind: str, unselected: str
) -> None:
    layer = {"kind": "layer", "attention": {"head_size": 4}, "ffn": {"hidden": 12}}
    residual = {"kind": "thinking", "unselected": unselected}
    loop = {"kind": "loop", "steps": 5, "body": layer, "residual": residual}
    router = {"kind": kind, "capacity": [0.3, 0.6, 0.3, 0.5]}
    fields = {"name": "m", "vocab_size": 11, "context": 40, "dim": 8}
    model = archdsl.build(fields | {"blocks": [loop | {"router": router}]}).double().eval()
    tokens_BT = torch.randint(11, (1, 40))
    with torch.no_grad(), model.causal_routing():
        whole_BTV = model(tokens_BT)
    shares: dict[str, list[float]] = {name: [] for name in model.router_shares()}
    cache, parts = model.new_cache(40), []
    for token_BT in tokens_BT.split(1, 1):
        with torch.no_grad():
            parts.append(model(token_BT, cache=cache))
        for name, share in model.router_shares().items():
            shares[name].append(share)
    torch.testing.assert_close(torch.cat(parts, 1), whole_BTV)
    assert [len(told) for told in shares.values()] == [40] * 4
    assert {share for told in shares.values() for share in told} == {0.0, 1.0}


@pytest.mark.parametrize("kind", [TopKSpec, PrefixSpec, ThresholdSpec, PredictorSpec, RandomSpec])
def test_only_tokens_that_are_left_are_selected(kind: type[RouterSpec]) -> None:
    router = built(kind(capacity=(0.6,)))
    active_BT = torch.rand(5, 13) < 0.9
    active_BT[:, :8] = True  # top_k takes for granted that enough are left
    choice = router(naive.stream(5, 13, D), at(0.6), Context(), active_BT)
    assert not (choice.mask(13) & ~active_BT).any()
    assert choice.mask(13).any()


def test_a_gate_is_alpha_times_the_squashed_score() -> None:
    x_BTD = naive.stream(1, 5, D)
    squashes = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
    for gate, squash in squashes.items():
        fields = {"capacity": [0.5, 0.999], "alpha": [1.0, 3.0], "gate": gate}
        spec = PrefixSpec.model_validate(fields)
        router = built(spec, steps=[0, 1])
        (weight_RD,) = router.parameters()
        choice = router(x_BTD, at(0.999, row=1), Context(), None)
        want = 3 * squash(x_BTD[0] @ weight_RD[1])[choice.index_BK[0]]
        found = router.weights(take(x_BTD, choice.index_BK), at(0.999, row=1), choice)
        assert found is not None
        torch.testing.assert_close(found[0], want)


def test_random_knows_the_place_and_nothing_else() -> None:
    router = built(RandomSpec(capacity=(0.5,)))
    here, there = naive.stream(3, 512, D), naive.stream(3, 512, D, seed=9)
    rows = selected_by(router, here)
    assert rows == selected_by(router, there)
    assert rows[0] == rows[1]
    assert list(router.parameters()) == []
    pos_BT = torch.arange(512).expand(3, 512) + 1000
    assert selected_by(router, here, Context(pos_BT=pos_BT)) != rows
    # what is computed in half precision selects the same
    assert selected_by(router, here.bfloat16()) == rows


def test_random_differs_by_seed_by_step_and_by_loop() -> None:
    x_BTD = naive.stream(1, 64, D)
    one, other = (built(RandomSpec(capacity=(0.5,), seed=s), steps=[0, 1]) for s in (0, 1))
    second = built(RandomSpec(capacity=(0.5,)))
    second.salt = 1
    rows = [selected_by(r, x_BTD)[0] for r in (one, other, second)]
    rows.append(selected_by(one, x_BTD, row=1)[0])
    assert len({tuple(row) for row in rows}) == 4


def test_random_selects_every_place_about_equally_often() -> None:
    x_BTD, counts = naive.stream(1, 64, D), torch.zeros(64)
    for seed in range(200):
        counts[selected_by(built(RandomSpec(capacity=(0.5,), seed=seed)), x_BTD)[0]] += 1 / 200
    # the budget makes the first places uneven: the first token always takes it, the second never
    assert counts[:2].round().tolist() == [1, 0]
    assert counts[8:].min() > 0.25
    assert counts[8:].max() < 0.65


def test_top_k_chooses_by_threshold_when_told_to_be_causal() -> None:
    top_k, threshold = built(TopKSpec(capacity=(0.5,))), built(ThresholdSpec(capacity=(0.5,)))
    assert isinstance(top_k, TopK)
    x_BTD = naive.stream(3, 13, D)
    assert selected_by(top_k, x_BTD) != selected_by(threshold, x_BTD)
    assert top_k.leaks
    top_k.causal.append(None)
    assert not top_k.leaks
    assert selected_by(top_k, x_BTD) == selected_by(threshold, x_BTD)


@pytest.mark.parametrize("spec", [ThresholdSpec, TopKSpec, PredictorSpec])
def test_a_trained_threshold_selects_any_share_that_is_dialled(
    spec: type[ThresholdSpec | TopKSpec | PredictorSpec],
) -> None:
    router = built(spec(capacity=(0.5,))).train()
    x_BTD = 3 * naive.stream(8, 512, D) + 1
    for _ in range(3):
        router(x_BTD, at(0.5), Context(), None)
        router.commit()
    router.eval()
    router.causal.append(None)
    for capacity in (0.05, 0.3, 0.8, 0.97):
        # the running budget takes off what chance brings too much
        share = router(x_BTD, at(capacity), Context(), None).stream.length_B.double().mean() / 512
        assert share == pytest.approx(capacity, abs=0.03)
        assert share <= capacity


def test_a_threshold_follows_the_scores_and_forgets_slowly() -> None:
    router = built(ThresholdSpec(capacity=(0.25,))).train()
    assert isinstance(router, Threshold)
    before = router.quantiles_RQ.clone()
    router.note(torch.linspace(0, 1, 401).double().unsqueeze(0), 0)
    assert router.quantiles_RQ.equal(before)  # what is being trained on must not choose
    router.commit()
    levels_Q = torch.linspace(0, 1, 257, dtype=torch.float64)
    torch.testing.assert_close(router.quantiles_RQ[0], levels_Q, rtol=0, atol=1e-6)
    for _ in range(200):
        router.note(torch.full((1, 4), 2.0).double(), 0)
        router.commit()
    # each counts 1/n at first, then MOMENTUM
    first = 1 / 50 * (1 - MOMENTUM) ** 151
    want_Q = 2 + first * (levels_Q - 2)
    torch.testing.assert_close(router.quantiles_RQ[0], want_Q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["threshold", "top_k", "predictor"])
def test_what_a_batch_teaches_is_the_same_in_parts(kind: str) -> None:
    layer = {"kind": "layer", "attention": {"head_size": 4}, "ffn": {"hidden": 12}}
    loop = {"kind": "loop", "steps": 3, "body": layer}
    router = {"kind": kind, "capacity": [0.6, 0.3], "nested": True}
    fields = {"name": "m", "vocab_size": 11, "context": 12, "dim": 8}
    tokens_BT = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))

    def taught(parts: int) -> list[Tensor]:
        """The losses of three batches and the statistics after them; all weights change between."""
        model = archdsl.build(fields | {"blocks": [loop | {"router": router}]}).double()
        seen = []
        for _ in range(3):
            cut = [model(part).sum(0) for part in tokens_BT.chunk(parts)]
            seen.append(torch.stack(cut).sum(0))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.1)
        model.commit()
        return [*seen, *model.buffers()]

    torch.testing.assert_close(taught(4), taught(1))


def test_padding_and_scores_that_are_no_numbers_teach_a_threshold_nothing() -> None:
    router = built(ThresholdSpec(capacity=(0.5,)))
    assert isinstance(router, Threshold)
    before = router.quantiles_RQ.clone()
    for nothing in (-math.inf, math.nan):
        router.note(torch.full((1, 3), nothing), 0)
        router.commit()
        assert router.quantiles_RQ.equal(before)
    router.note(torch.tensor([[1.0, -math.inf, 3.0, -math.inf]]), 0)
    router.commit()
    assert router.quantiles_RQ[0, [0, -1]].tolist() == [1, 3]


def test_a_predictor_learns_the_choice_and_the_stream_does_not_learn_from_it() -> None:
    router = built(PredictorSpec(capacity=(0.5,))).train()
    assert isinstance(router, Predictor)
    x_BTD = naive.stream(4, 256, D)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    accuracies = []
    for _ in range(60):
        ctx = Context()
        choice = router(x_BTD, at(0.5), ctx, None)
        assert choice.keep_BK is None  # in training the choice is that of top_k
        optimizer.zero_grad()
        (loss,) = ctx.trace.losses.values()
        loss.backward()
        optimizer.step()
        accuracies.append(ctx.trace.accuracies["loop.0"].item())
    assert x_BTD.grad is None
    assert router.weight_RD.grad is None
    assert accuracies[-1] > 0.95 > accuracies[0]
    router.eval()
    ctx = Context()
    share = router(x_BTD, at(0.5), ctx, None).mask(256).double().mean()
    assert share == pytest.approx(0.5, abs=0.05)
    assert ctx.trace.losses == {}


def test_a_predictor_learns_from_each_of_its_runs() -> None:
    router = built(PredictorSpec(capacity=(0.5,))).train()
    runs = [naive.stream(2, 9, D) + shift for shift in (0, 1)]
    apart, together = [Context(), Context()], Context()
    for x_BTD, ctx in zip(runs, apart, strict=True):
        router(x_BTD, at(0.5), ctx, None)
        router(x_BTD, at(0.5), together, None)
    first, second = (ctx.trace.losses["loop.0"] for ctx in apart)
    naive.agree(together.trace.losses["loop.0"], first + second, list(router.parameters()))


@pytest.mark.parametrize("capacity", [(0.0,), (1.1,), (), (float("nan"),), (0.5,) * 65])
def test_rejects_a_capacity_that_is_no_share(capacity: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="capacity"):
        PrefixSpec(capacity=capacity)


def built(spec: RouterSpec, steps: list[int] | None = None) -> ScoreRouter:
    router = spec.build(D, steps or [0])
    with torch.no_grad():
        router.reset(torch.Generator(), 1)
    naive.randomise(router)
    assert isinstance(router, ScoreRouter)
    return router


def selected(index_BK: Tensor, keep_BK: Tensor | None) -> list[list[int]]:
    kept = torch.ones_like(index_BK, dtype=torch.bool) if keep_BK is None else keep_BK
    return [row[keep].tolist() for row, keep in zip(index_BK, kept, strict=True)]


def selected_by(
    router: ScoreRouter, x_BTD: Tensor, ctx: Context | None = None, row: int = 0
) -> list[list[int]]:
    choice = router(x_BTD, at(0.5, row), ctx or Context(), None)
    return selected(choice.index_BK, choice.keep_BK)


def at(capacity: float, row: int = 0) -> Step:
    return Step("loop.0", row, capacity, among=1.0, key="loop.0")


def select(
    router: ScoreRouter, score_BT: Tensor, capacity: float
) -> tuple[Tensor, Tensor | None, Stream]:
    return router.select(
        score_BT.unsqueeze(-1), score_BT, score_BT > -math.inf, at(capacity), Context()
    )


def prefix_share(score_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    index_BK, keep_BK, _ = select(built(PrefixSpec()), score_BT, capacity)
    assert keep_BK is not None
    return index_BK, keep_BK
