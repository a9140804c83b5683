"""Jobs: trained once however often they are asked for, gone on with wherever they were stopped."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import archdsl
from archdsl.blocks.lora import LoraSpec
from archdsl.errors import ArchdslError
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.build import build
from archdsl.model.checkpoint import load_training
from archdsl.search.trials import proxy
from archdsl.search.trials.curve import MOST, Curve
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.trials.proxy_scoring import entropy
from archdsl.search.trials.proxy_training import OF_THE_MACHINE
from archdsl.search.workers.pool import process_pool
from tests.search.works import DiesAt
from tests.strategies import specs
from tests.training.damage import change_json, change_tensors

TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(2, 4), eval_tokens=240
)
PROXY = Proxy(dim=16, head_size=8, tasks={"skill": TASK})


def small(**changes: Any) -> ModelSpec:
    spec = PROXY.shrink(load("tiny"), TASK)  # a layer, and a loop of three steps with a router
    for path, value in changes.items():
        spec = spec.patch(path.replace("__", "."), value)
    return spec


# their rows may count something: tokens, steps, experts (of which "b" is the low-rank difference)
COUNTED = ("embedding", "head", "encoding", "router", "score", "select", "b")


@settings(max_examples=300)
@given(specs())
def test_every_size_keeps_its_share_of_the_width(spec: ModelSpec) -> None:
    """Else the proxies of some models are larger, against the others, than the models are."""
    narrow = spec.resized(Sizes(64, 16, 50, 16, 9))
    wide = narrow.resized(Sizes(256, 64, 50, 64, 9))
    sizes = {name: p.shape for name, p in build(wide, device="meta").named_parameters()}
    for name, parameter in build(narrow, device="meta").named_parameters():
        rows = {1, 4} if set(COUNTED) & set(name.split(".")) else {4}
        ratios = [large // small for small, large in zip(parameter.shape, sizes[name], strict=True)]
        assert ratios[0] in rows, name
        assert set(ratios[1:]) <= {4}, name


def test_a_low_rank_keeps_its_scale_and_is_never_lost() -> None:
    lora = LoraSpec(rank=(0, 8, 32, 96), alpha=48)
    narrow = lora.resized(Sizes(1024, 0, 0, 0, 0), Sizes(32, 0, 0, 0, 0))
    assert narrow == LoraSpec(rank=(0, 1, 1, 3), alpha=6)  # the first of them keeps its scale
    assert LoraSpec(rank=(0,)).resized(Sizes(64, 0, 0, 0, 0), Sizes(8, 0, 0, 0, 0)).rank == (0,)


def job(store: Path, steps: int = 4, spec: ModelSpec | None = None, **task: Any) -> Job:
    return TASK.model_copy(update=task).job(store, spec or small(), 0, steps)


def run(job: Job) -> ProxyScore:
    return job.run(lambda: None)


def found(score: ProxyScore) -> dict[str, Any]:
    """All but how fast it was, and how often."""
    return score.model_dump(exclude=OF_THE_MACHINE)


def trained(score: ProxyScore) -> dict[str, Any]:
    """What does not depend on where the rung began."""
    return {k: v for k, v in found(score).items() if k != "train_flops"}


def test_a_score_says_what_was_found_and_spent(tmp_path: Path) -> None:
    score = run(job(tmp_path))
    assert score.loss is not None
    assert score.loss > 0
    assert [step for step, _ in score.curve] == [1, 2, 3, 4]
    per_token = archdsl.cost(small()).expected
    assert score.train_flops == pytest.approx(3 * per_token * 4 * TASK.batch_size * 12)
    assert score.flops_per_token is not None
    assert score.eval_flops == pytest.approx(score.flops_per_token * 240)
    assert score.seconds > 0
    assert score.peak_bytes > 2**24
    assert not score.reused


def test_the_same_job_is_trained_once(tmp_path: Path) -> None:
    first = run(job(tmp_path))
    again = run(job(tmp_path, rungs=(4, 8), weight=3.0))  # no matter for this rung
    assert again.reused
    assert again == first.model_copy(update={"reused": True})
    assert job(tmp_path).stored_score() == again
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "made_by.json").read_text())["data_name"].startswith("skill:p-hop")


def test_by_two_processes_at_once_too(tmp_path: Path) -> None:
    one = job(tmp_path, steps=30)
    with process_pool(2) as pool:
        scores = [future.result() for future in [pool.submit(one), pool.submit(one)]]
    assert sorted(score.reused for score in scores) == [False, True]
    assert found(scores[0]) == found(scores[1])


def test_who_waits_for_another_beats(tmp_path: Path) -> None:
    def heartbeat() -> None:
        raise TimeoutError

    stored_run = job(tmp_path).stored_run
    with stored_run.locked(lambda: None), pytest.raises(TimeoutError), stored_run.locked(heartbeat):
        pytest.fail("two had the same place")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 1e-3},
        {"eval_tokens": 120},
        {"data": "skill:p-hop,length=12"},
        {"device": "cuda"},
    ],
)
def test_what_decides_a_score_has_a_place_of_its_own(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    seed = change.pop("seed", 0)
    other = replace(job(tmp_path, **change), seed=seed)
    assert other.stored_run.folder != job(tmp_path).stored_run.folder


def test_a_rung_is_climbed_from_the_one_below(tmp_path: Path) -> None:
    at_once = run(job(tmp_path / "once"))
    below, above = (run(job(tmp_path / "twice", steps)) for steps in (2, 4))
    assert trained(above) == trained(at_once)
    assert below.train_flops + above.train_flops == at_once.train_flops


def test_held_out_losses_on_the_way_change_nothing_and_outlive_a_rung(tmp_path: Path) -> None:
    plain = run(job(tmp_path / "plain"))
    whole = run(job(tmp_path / "whole", held_out_every=1))
    run(job(tmp_path / "parts", 2, held_out_every=1))
    parts = run(job(tmp_path / "parts", 4, held_out_every=1))
    assert [step for step, _ in whole.held_out] == [1, 2, 3, 4]
    assert parts.held_out == whole.held_out
    assert (whole.loss, whole.curve) == (plain.loss, plain.curve)
    assert parts.step_seconds > run(job(tmp_path / "parts", 2, held_out_every=1)).step_seconds


def test_rungs_below_the_last_may_be_scored_on_fewer_tokens(tmp_path: Path) -> None:
    few = run(job(tmp_path / "few", 2, early_eval_tokens=24))
    assert few.loss == run(job(tmp_path / "alone", 2, eval_tokens=24)).loss
    last = run(job(tmp_path / "few", early_eval_tokens=24))
    assert trained(last) == trained(run(job(tmp_path / "plain")))
    assert last.train_flops == few.train_flops  # it went on from the first rung
    ends_there = run(job(tmp_path / "few", 2, rungs=(2,), early_eval_tokens=24))
    assert trained(ends_there) == trained(run(job(tmp_path / "plain", 2)))


def test_a_rung_in_between_leaves_the_furthest_state(tmp_path: Path) -> None:
    run(job(tmp_path))
    between = run(job(tmp_path, 3))
    assert found(between) == found(run(job(tmp_path / "fresh", 3)))
    assert load_training(job(tmp_path).stored_run.state)["step"] == 4


def test_one_that_is_killed_on_the_way_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    with process_pool(1) as pool:
        error = pool.submit(DiesAt(job(tmp_path), 3)).exception()
        assert "killed" in str(error)
        assert load_training(job(tmp_path).stored_run.state)["step"] == 2
        assert not list(tmp_path.glob("*/step-*.json"))
        resumed = pool.submit(job(tmp_path)).result()
    assert found(resumed) == found(run(job(tmp_path / "undisturbed")))


def test_a_group_of_processes_goes_on_with_a_rung_of_one_and_finds_the_same(tmp_path: Path) -> None:
    # 9 batches: each process scores one that the other does not
    below, above, alone = (
        job(tmp_path / out, steps, eval_tokens=216)
        for out, steps in [("two", 2), ("two", 4), ("one", 4)]
    )
    run(below)
    with process_pool(1, devices=2) as pool:
        error = pool.submit(DiesAt(above, 2, rank=1)).exception()
        assert "killed" in str(error)
        # the first process may have kept the step after which the other was killed
        assert load_training(above.stored_run.state)["step"] in (3, 4)
        score, wanted = pool.submit(above).result(), run(alone)
    for name in ("loss", "accuracy", "shares", "entropies"):
        assert getattr(score, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    # estimated for each pass by its mean share, rounded to whole tokens, of which there are 12 here
    for name in ("flops_per_token", "eval_flops"):
        assert getattr(score, name) == pytest.approx(getattr(wanted, name), rel=5e-3), name
    assert [x for point in score.curve for x in point] == pytest.approx(
        [x for point in wanted.curve for x in point], abs=1e-5
    )
    assert above.stored_score() == score.model_copy(update={"reused": True})
    shutil.copytree(above.stored_run.state, alone.stored_run.state, dirs_exist_ok=True)
    further = replace(alone, steps=6, task=alone.task.up_to(6))
    assert run(further).curve[:4] == score.curve  # one process goes on with what a group has saved


@pytest.mark.parametrize("name", ["training.safetensors", "provenance.json"])
def test_a_state_that_a_power_failure_has_damaged_is_trained_again(
    tmp_path: Path, name: str
) -> None:
    run(job(tmp_path, 2))
    file = job(tmp_path).stored_run.state / name
    file.write_bytes(bytes(file.stat().st_size))
    resumed = run(job(tmp_path))
    assert found(resumed) == found(run(job(tmp_path / "undisturbed")))
    assert load_training(job(tmp_path).stored_run.state)["step"] == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: change_tensors(state, "training.safetensors", dict.clear),
        lambda state: change_json(state, "training.json", lambda told: told.pop("tokens")),
        lambda state: change_json(state, "training.json", lambda told: told.pop("progress")),
        lambda state: change_json(state, "training.json", lambda told: told.update(progress=3)),
        lambda state: change_json(
            state, "training.json", lambda told: told["progress"]["curve"].update(width=0)
        ),
    ],
)
def test_a_state_in_which_something_is_missing_is_trained_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run(job(tmp_path, 2))
    damage(job(tmp_path).stored_run.state)
    assert found(run(job(tmp_path))) == found(run(job(tmp_path / "undisturbed")))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no score"),
        ("[]", "is no score"),
        ('{"steps": 4}', "loss: is required"),
        ('{"steps": "four"}', "steps: must be a whole number, got 'four'"),
    ],
)
def test_a_damaged_score_is_refused_by_its_file(tmp_path: Path, text: str, complaint: str) -> None:
    run(job(tmp_path))
    file = job(tmp_path).stored_run.score(4)
    file.write_text(text)
    with pytest.raises(ArchdslError) as error:
        job(tmp_path).stored_score()
    told = str(error.value)
    assert told.startswith(f"{file}: {complaint}")
    assert told.endswith("; delete the file, and the proxy is scored again")
    assert "\n" not in told


def test_smaller_batches_find_the_same_up_to_rounding(tmp_path: Path) -> None:
    whole = job(tmp_path / "whole")
    half = replace(whole, store=tmp_path / "half").smaller()
    assert half is not None
    assert half.stored_run.folder.name == whole.stored_run.folder.name
    score = run(half)
    assert score.accumulate == 2
    assert score.loss == pytest.approx(run(whole).loss, abs=1e-5)
    quarter = half.smaller()
    assert quarter is not None
    assert quarter.smaller() is None  # a sequence cannot be cut


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_worker_trains_on_its_gpu(tmp_path: Path) -> None:
    with process_pool(1) as pool:
        score = pool.submit(job(tmp_path, device="cuda")).result()
    assert score.loss == pytest.approx(run(job(tmp_path)).loss, rel=0.05)  # in bfloat16


def test_divergence_is_a_result(tmp_path: Path) -> None:
    score = run(job(tmp_path, lr=1e38))
    assert score.loss is None
    assert score.train_flops > 0
    assert run(job(tmp_path, lr=1e38)).reused


def test_a_leaking_router_is_judged_by_its_causal_passes(tmp_path: Path) -> None:
    spec = small(blocks__1__router__kind="top_k")
    score = run(job(tmp_path, spec=spec))
    assert score.flops_per_token is not None
    assert score.eval_flops == pytest.approx(2 * score.flops_per_token * 240)
    leaky = archdsl.build(spec, seed=0)
    assert leaky.leaks
    assert set(score.shares) == set(score.entropies) == {"blocks.1.0", "blocks.1.1"}
    assert all(share < 0.5 for share in score.shares.values())  # causal: within the budget so far


def test_only_learned_choices_have_an_entropy(tmp_path: Path) -> None:
    score = run(job(tmp_path, spec=small(blocks__1__router__kind="random")))
    assert set(score.shares) == {"blocks.1.0", "blocks.1.1"}
    assert score.entropies == {}


def test_entropy_is_in_bits() -> None:
    assert entropy(torch.zeros(1)).item() == pytest.approx(1)
    assert entropy(torch.tensor([90.0, -90.0])).tolist() == pytest.approx([0, 0])
    p = 1 / (1 + math.exp(-1.5))
    naive = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert entropy(torch.tensor(1.5)).item() == pytest.approx(naive, rel=1e-5)


@given(st.integers(1, 500), st.integers(0, 500))
def test_a_curve_is_short_whole_and_can_be_gone_on_with(steps: int, stop: int) -> None:
    curve, stopped = Curve(), Curve()
    for step in range(1, steps + 1):
        curve.add(step, float(step))
        stopped.add(step, float(step))
        if step == stop:
            stopped = Curve(**asdict(stopped))
    points = curve.up_to(steps)
    assert stopped.up_to(steps) == points
    assert len(points) <= MOST
    assert points[-1][0] == steps
    begins = [0, *(step for step, _ in points)]
    assert [loss for _, loss in points] == [
        (begin + 1 + end) / 2 for begin, end in pairwise(begins)
    ]


def test_a_job_takes_its_data_along_and_a_task_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = job(tmp_path, data=None)
    held = pickle.dumps(sent)
    assert len(held) < 20_000
    monkeypatch.setattr(proxy, "_load", lambda *_: pytest.fail("the data was loaded again"))
    assert pickle.loads(pickle.dumps(sent.task)) == sent.task
    arrived = pickle.loads(held)
    assert arrived.stored_run.folder == sent.stored_run.folder
    assert sent.data is not None
    batches = [one.load().batch(3, 2, 9, 1).tokens_BT for one in (sent, arrived)]
    assert torch.equal(*batches)


def test_a_job_whose_token_cache_was_deleted_loads_its_data_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHDSL_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 400)
    sent = job(tmp_path, data=str(text))
    held = pickle.dumps(sent)
    shutil.rmtree(tmp_path / "cache")
    arrived = pickle.loads(held)
    proxy._load.cache_clear()
    assert arrived.data is None
    assert arrived.stored_run.folder == sent.stored_run.folder
