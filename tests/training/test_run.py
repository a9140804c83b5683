"""Tests of training: gradients, resuming with the same bits after every interruption, errors."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from archdsl.data.loading import SkillData, load_data
from archdsl.data.skills import parse_skill
from archdsl.data.types import IGNORE, Batch
from archdsl.errors import ArchdslError
from archdsl.files import exclusive
from archdsl.interop.retrofit import parse_overlay, retrofit
from archdsl.lang.load import load
from archdsl.lang.source import from_value
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.training.run import (
    FolderInUseError,
    RunMismatchError,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    TrainStep,
    last_checkpoint,
    train,
)
from archdsl.training.trainer import compile_layers
from tests.shipped import STRUCTURES
from tests.test_files import no_file_above

SKILL = SkillData(parse_skill("p-hop,hops=1,length=16"))
CONFIG = TrainConfig(
    steps=12, lr=1e-3, batch_size=4, eval_every=6, eval_tokens=64, checkpoint_every=5, log_every=1
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | changes)


def spec(*overrides: str) -> ModelSpec:
    return load("tiny", overrides=["dim=16", "vocab_size=8", "context=16", *overrides])


def trainer(**changes: Any) -> Trainer:
    return Trainer(build(spec()), SKILL, config(**changes))


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: LanguageModel, right: LanguageModel) -> bool:
    """Whether all parameters and buffers, such as the quantiles of the routers, are equal."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = {"tokens_per_s", "flops_per_s"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@dataclass(frozen=True)
class HookedData(SkillData):
    """The skill data, with a function that is called before the batch of step ``at`` is drawn."""

    at: int
    happens: Callable[[], object]

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        if index == self.at:
            self.happens()
        return super().batch(index, batch_size, context, seed)


class Killed(BaseException):
    """An exception that no code catches, as a stand-in for a kill."""


def kill() -> None:
    raise Killed


# The gradient


def test_the_loss_is_the_float64_mean_over_the_asked_tokens() -> None:
    model = build(spec(), dtype=torch.float64)
    batch = SKILL.batch(0, 4, 16, seed=0)
    log_p_BTV = model(batch.tokens_BT).detach().log_softmax(-1)
    asked = [(b, t) for b in range(4) for t in range(16) if batch.targets_BT[b, t] != IGNORE]
    expected = -sum(float(log_p_BTV[b, t, batch.targets_BT[b, t]]) for b, t in asked) / len(asked)
    assert Trainer(model, SKILL, CONFIG).backward(batch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts: int) -> None:
    batch = SKILL.batch(0, 4, 16, seed=0)
    batch.targets_BT[0, 3:] = IGNORE  # so that the parts have very different numbers of targets
    whole, cut = (
        Trainer(build(spec(), dtype=torch.float64), SKILL, config(accumulate=n)) for n in (1, parts)
    )
    assert cut.backward(batch) == pytest.approx(whole.backward(batch), rel=1e-12)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_recomputing_activations_changes_memory_alone() -> None:
    plain, recomputed = trainer(steps=3), trainer(steps=3, activation_checkpointing=True)
    plain.run()
    recomputed.run()
    assert recomputed.model.checkpoint_activations
    assert same(plain.model, recomputed.model)


def test_bfloat16_rounds_the_arithmetic_and_not_the_weights() -> None:
    exact, rounded = trainer(), trainer(dtype="bfloat16")
    batch = SKILL.batch(0, 4, 16, seed=0)
    loss = exact.backward(batch)
    assert rounded.backward(batch) == pytest.approx(loss, rel=0.02)
    assert rounded.backward(batch) != loss
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported() -> None:
    run = trainer(clip=1e-3, steps=1)
    seen: list[TrainStep] = []
    run.run(on_step=seen.append)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    assert seen[0].grad_norm > 1e-2
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(1e-3, rel=1e-3)


def test_matrices_decay_and_gains_routers_encodings_and_embeddings_do_not() -> None:
    run = trainer(weight_decay=0.5)
    names = {id(p): name for name, p in run.model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in run.optimizer.param_groups)
    assert [g["weight_decay"] for g in run.optimizer.param_groups] == [0.5, 0.0]
    assert decayed | others == set(names.values())
    assert "head.weight" in decayed
    assert "embedding.weight" in others
    for name, parameter in run.model.named_parameters():
        if parameter.ndim < 2 or "norm" in name or "router" in name or "encoding" in name:
            assert name in others
        elif name != "embedding.weight":
            assert name in decayed


def test_training_learns() -> None:
    run = trainer(steps=60, batch_size=16, lr=1e-2)
    seen: list[TrainStep] = []
    run.run(on_step=seen.append)
    assert seen[0].loss > 1.8
    assert seen[-1].loss < 1.45  # guessing among the four letters has a loss of log 4 = 1.39
    assert [step.lr for step in seen] == [run.config.learning_rate(n) for n in range(60)]


@pytest.mark.slow
def test_training_learns_a_skill() -> None:
    data = load_data("skill:p-hop,hops=1,length=12")
    model = load("tiny", overrides=["vocab_size=4", "context=12"])
    settings = TrainConfig(steps=100, batch_size=64, lr=3e-3, eval_every=0)
    assert train(model, data, settings).validation.accuracy > 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler uses deprecated functions of torch
def test_a_compiled_model_trains_alike_and_saves_under_the_same_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Processes that compile beside this one would have to import torch again.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    # The structures are traced in the test below: one loop is enough for the code generator.
    model = spec("blocks=[{kind: loop, steps: 2, router: prefix, body: {kind: feed_forward}}]")
    plain, compiled = (
        Trainer(build(model), SKILL, config(steps=2, compile=flag)) for flag in (False, True)
    )
    plain.run()
    compiled.run()
    for (name, a), (other, b) in zip(
        weights(plain.model).items(), weights(compiled.model).items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert compiled.model.router_shares().keys() == plain.model.router_shares().keys()


# Three equal layers and loops show that they share their graphs.
SMALL = Sizes(dim=16, context=24, vocab_size=8, head_size=8, repeat=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in STRUCTURES
            if name.endswith("-tiny") or name in ("itt", "mod", "universal")
        ),
    ],
)
def test_a_layer_is_one_graph_and_stays_it(name: str) -> None:
    torch._dynamo.reset()
    model = load(name).resized(SMALL).model_copy(update={"training": None})  # one depth
    plain, compiled = (
        Trainer(build(model), SKILL, config(context=24, eval_every=0)) for _ in range(2)
    )
    counter = CompileCounter()
    compile_layers(compiled.model, backend=counter)
    counts = []
    for step in (1, 2, 5):
        plain.run(step)
        compiled.run(step)
        counts.append(counter.frame_count)
    layers = {layer.model_dump_json() for block in model.blocks for layer in block.unrolled()}
    assert counts[0] == counts[-1] <= 2 * len(layers), "equal layers and loops share their graphs"
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# Stopping and resuming


def test_a_run_advanced_rung_by_rung_is_one_run_and_disturbs_nobody() -> None:
    whole, rungs, neighbour = trainer(), trainer(), trainer(seed=1)
    whole.run()
    before = torch.get_rng_state()
    for until in (3, 4, 9, 100):
        rungs.run(until)
        neighbour.run(until)
    assert rungs.step == 12
    assert same(whole.model, rungs.model)
    assert not same(whole.model, neighbour.model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = trainer(steps=20), trainer(steps=20), trainer(steps=20)
    whole.run()
    first.run(10)
    first.save(tmp_path / "here")
    second.model.initialise(7)  # loading must replace these weights
    second.load(tmp_path / "here")
    second.run()
    assert same(whole.model, second.model)
    left, right = whole.state(), second.state()
    assert left.keys() == right.keys()
    assert any(key.endswith("exp_avg_sq") for key in left)
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]


class Noise(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x_BTD: Tensor, ctx: object) -> Tensor:
        noise_BTD = torch.randn_like(x_BTD)
        self.drawn.append(float(noise_BTD[0, 0, 0]))
        return x_BTD + noise_BTD


def test_a_predictor_is_trained_and_its_accuracy_logged(tmp_path: Path) -> None:
    model = spec("blocks.1.router.kind=predictor")
    before = weights(build(model, seed=CONFIG.seed))
    after = weights(train(model, SKILL, CONFIG, tmp_path).model)
    for name in ("predict_RD", "bias_R", "weight_RD", "quantiles_RQ"):
        assert not after[f"blocks.1.router.{name}"].equal(before[f"blocks.1.router.{name}"]), name
    for line in metrics(tmp_path):
        assert line["predictor_accuracies"].keys() == line["router_shares"].keys()
        assert all(0 <= share <= 1 for share in line["predictor_accuracies"].values())


def test_random_numbers_in_the_model_are_resumed_too() -> None:
    whole, first, second = trainer(), trainer(), trainer()
    noises = [Noise(), Noise(), Noise()]
    for run, noise in zip((whole, first, second), noises, strict=True):
        run.model.blocks.append(noise)
        run.model.layers.append(noise)
    whole.run()
    first.run(5)
    second.model.load_state_dict(first.model.state_dict())
    second.restore(first.state())
    torch.manual_seed(99)
    second.run()
    assert same(whole.model, second.model)
    assert noises[1].drawn + noises[2].drawn == noises[0].drawn
    assert len(set(noises[0].drawn)) == 12


@pytest.mark.parametrize(
    ("at", "router"), [(3, "prefix"), (5, "top_k"), (7, "threshold"), (11, "predictor")]
)
def test_a_killed_run_loses_at_most_one_interval_and_ends_as_if_nothing_had_been(
    tmp_path: Path, at: int, router: str
) -> None:
    model = spec(f"blocks.1.router.kind={router}")
    whole = train(model, SKILL, CONFIG, tmp_path / "whole")
    with pytest.raises(Killed):
        train(model, HookedData(SKILL.skill, at, kill), CONFIG, tmp_path / "killed")
    again = train(model, SKILL, CONFIG, tmp_path / "killed")
    assert again.resumed_from == at // 5 * 5
    assert same(whole.model, again.model)
    assert again.validation == whole.validation
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 13))


def test_a_line_cut_short_and_a_half_written_checkpoint_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), CONFIG, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    half = tmp_path / "checkpoints" / ".step-000007.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert train(spec(), SKILL, CONFIG, tmp_path).resumed_from == 5
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))
    assert not half.exists()


def test_an_altered_checkpoint_is_refused_rather_than_trained_on(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), CONFIG, tmp_path)
    file = tmp_path / "checkpoints" / "step-000005" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"step-000005/training.safetensors was altered"):
        train(spec(), SKILL, CONFIG, tmp_path)


LONG = CONFIG.model_copy(update={"steps": 80, "eval_every": 40})


@pytest.mark.slow
def test_kill_9_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The killed processes are forks of this one, so that they need not import torch again."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for moment in (12, 33, 61):
        child = multiprocessing.get_context("fork").Process(
            target=train, args=(spec(), SKILL, LONG, killed)
        )
        child.start()
        while child.is_alive() and steps_in(killed) < moment:
            time.sleep(0.002)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    found = train(spec(), SKILL, LONG, killed)
    assert 0 < found.resumed_from < LONG.steps
    assert same(found.model, train(spec(), SKILL, LONG, whole).model)
    assert metrics(killed) == metrics(whole)
    finals = [load_checkpoint(out / "final").model for out in (killed, whole)]
    assert same(*finals)


def steps_in(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_and_save_the_step_and_say_how_to_go_on(
    tmp_path: Path, ending: signal.Signals
) -> None:
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    press = HookedData(SKILL.skill, 6, lambda: os.kill(os.getpid(), ending))
    with pytest.raises(KeyboardInterrupt, match=r"after step 7; the same command .*step-000007"):
        train(spec(), press, CONFIG, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == usual
    again = train(spec(), SKILL, CONFIG, tmp_path)
    assert again.resumed_from == 7
    assert same(again.model, train(spec(), SKILL, CONFIG).model)


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    hooked = HookedData(SKILL.skill, 6, press_twice)
    child = multiprocessing.get_context("fork").Process(
        target=train, args=(spec(), hooked, CONFIG, tmp_path)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGTERM
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000005"


@pytest.mark.parametrize("finished", [False, True])
def test_one_training_at_a_time_may_use_a_folder(tmp_path: Path, finished: bool) -> None:
    def begin_another() -> None:
        said = rf"another process is training in {tmp_path}; wait until it ends, or choose another"
        with pytest.raises(FolderInUseError, match=said):
            train(spec(), SKILL, CONFIG, tmp_path)
        train(spec(), SKILL, CONFIG, tmp_path.parent / "other")  # in another folder it may

    if finished:
        train(spec(), SKILL, CONFIG, tmp_path)
        with exclusive(tmp_path, ArchdslError("in use")):
            begin_another()
    else:
        train(spec(), HookedData(SKILL.skill, 6, begin_another), CONFIG, tmp_path)
    assert same(
        train(spec(), SKILL, CONFIG, tmp_path).model,
        train(spec(), SKILL, CONFIG, tmp_path.parent / "other").model,
    )
    assert metrics(tmp_path) == metrics(tmp_path.parent / "other")


@pytest.mark.parametrize(
    ("size", "what"),
    [(10, r"metrics.jsonl"), (700, r"metrics.jsonl"), (4_000, r"checkpoints/step-000005")],
)
def test_a_full_disk_ends_a_run_that_then_goes_on(tmp_path: Path, size: int, what: str) -> None:
    with no_file_above(size), pytest.raises(ArchdslError) as error:
        train(spec(), SKILL, CONFIG, tmp_path)
    assert str(error.value) == f"{tmp_path}/{what} could not be written: File too large"
    assert not list(tmp_path.rglob(".*"))
    assert same(train(spec(), SKILL, CONFIG, tmp_path).model, train(spec(), SKILL, CONFIG).model)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


def test_all_files_of_a_run_may_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    train(spec(), SKILL, CONFIG, tmp_path)
    fresh = tmp_path / "fresh"
    fresh.touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {fresh.stat().st_mode}


def test_a_finished_run_is_read_back_and_not_trained_again(tmp_path: Path) -> None:
    usual = signal.getsignal(signal.SIGINT)
    first = train(spec(), SKILL, CONFIG, tmp_path)
    assert signal.getsignal(signal.SIGINT) is usual
    again = train(spec(), HookedData(SKILL.skill, 0, kill), CONFIG, tmp_path)
    assert (again.resumed_from, again.validation) == (12, first.validation)
    assert same(first.model, again.model)
    assert same(load_checkpoint(tmp_path / "final").model, first.model)


def test_the_last_checkpoints_are_kept_and_no_others(tmp_path: Path) -> None:
    train(spec(), SKILL, config(checkpoint_every=2, keep_last=3), tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000008", "step-000010"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000010"


@pytest.mark.parametrize("killed_at", [7, None])
def test_another_run_in_the_same_folder_is_refused_by_what_differs(
    tmp_path: Path, killed_at: int | None
) -> None:
    if killed_at is None:
        train(spec(), SKILL, CONFIG, tmp_path)
    else:
        with pytest.raises(Killed):
            train(spec(), HookedData(SKILL.skill, killed_at, kill), CONFIG, tmp_path)
    other = load_data("skill:p-hop,hops=2,length=16")
    for model, data, settings, difference in (
        (spec(), SKILL, config(lr=0.5), r"config.lr: 0.001 there, 0.5 now"),
        (spec("blocks.1.steps=4"), SKILL, CONFIG, r"spec.blocks.1.steps: 3 there, 4 now"),
        (spec(), other, CONFIG, r"data.name: .*hops=1.* there, .*hops=2.* now"),
    ):
        with pytest.raises(RunMismatchError, match=difference):
            train(model, data, settings, tmp_path)
    renamed = spec("name=other")
    watched = config(log_every=3, keep_last=9, eval_every=0, checkpoint_every=1, device="cpu")
    assert train(renamed, SKILL, watched, tmp_path).resumed_from == (12 if killed_at is None else 5)


@pytest.mark.parametrize(
    ("changes", "killed_at", "start"),
    [
        ({"schedule": "constant"}, None, 12),
        ({"schedule": "constant"}, 11, 10),
        ({"schedule": "wsd", "decay_share": 0.5}, None, 6),  # after which the rate falls
        ({"schedule": "wsd", "decay_share": 0.5, "keep_last": 1}, None, 6),
        ({"schedule": "wsd", "decay_share": 0.5}, 11, 6),
    ],
)
def test_a_run_goes_on_to_more_steps_where_the_rates_so_far_are_the_same(
    tmp_path: Path, changes: dict[str, Any], killed_at: int | None, start: int
) -> None:
    changes = {"warmup_steps": 2, "keep_last": 3} | changes
    data = SKILL if killed_at is None else HookedData(SKILL.skill, killed_at, kill)
    with nullcontext() if killed_at is None else pytest.raises(Killed):
        train(spec(), data, config(**changes), tmp_path / "run")
    whole = train(spec(), SKILL, config(steps=20, **changes), tmp_path / "whole")
    more = train(spec(), SKILL, config(steps=20, **changes), tmp_path / "run")
    assert (more.resumed_from, more.steps) == (start, 20)
    assert same(whole.model, more.model)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    kept = [
        sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir())
        for run in ("run", "whole")
    ]
    assert kept[0][-2:] == kept[1][-2:]
    assert len(kept[0]) <= changes["keep_last"] + ("decay_share" in changes)
    assert train(spec(), SKILL, config(steps=20, **changes), tmp_path / "run").resumed_from == 20


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 20),  # every rate of a cosine depends on the number of steps
        ({"schedule": "constant", "warmup_steps": 2}, 8),
        ({"schedule": "wsd", "decay_share": 1.0, "warmup_steps": 2}, 20),
        ({"schedule": "constant", "warmup_steps": None}, 20),  # a tenth of the steps: 1, then 2
    ],
)
def test_where_a_run_cannot_have_other_steps_the_error_says_what_can_be_done(
    tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    train(spec(), SKILL, config(**changes), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunMismatchError) as refused:
        train(spec(), SKILL, config(**changes, steps=steps), tmp_path)
    final = tmp_path / "final"
    assert f"config.steps: 12 there, {steps} now" in str(refused.value)
    assert f"from its weights: `archdsl train {final} --steps N --out FOLDER`." in str(
        refused.value
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_warm_up_that_depends_on_the_steps_is_named_and_can_be_given(tmp_path: Path) -> None:
    train(spec(), SKILL, config(schedule="constant"), tmp_path)  # a tenth of the steps: 1
    with pytest.raises(RunMismatchError, match=r"\nGive --warmup-steps 1, as it was there\.\n"):
        train(spec(), SKILL, config(schedule="constant", steps=20), tmp_path)
    more = config(schedule="constant", steps=20, warmup_steps=1)
    assert train(spec(), SKILL, more, tmp_path).resumed_from == 12
    with pytest.raises(RunMismatchError, match="A run does not go back to fewer steps"):
        train(spec(), SKILL, config(schedule="constant", warmup_steps=1), tmp_path)


# Starting from a checkpoint

OVERLAY = {
    "name": "itt",
    "layers": [0],
    "loop": {
        "steps": 3,
        "router": {"kind": "prefix"},
        "residual": "thinking",
        "encoding": {"kind": "scale", "init": 0},
        "parameters": "per_step",  # so that some of the new parameters are matrices
    },
}


def grown(path: Path, seed: int = 0) -> Checkpoint:
    """Return a retrofitted checkpoint whose old weights are initialised with the seed."""
    save_checkpoint(path / "base", build(spec(), seed=seed), tokenizer_from=None, provenance={})
    overlay = parse_overlay(from_value(OVERLAY, "overlay"))
    made = retrofit(load_checkpoint(path / "base"), overlay)
    save_checkpoint(path / "grown", made.model, tokenizer_from=None, provenance=made.provenance)
    return load_checkpoint(path / "grown")


@pytest.mark.parametrize("only", ["new", "all"])
def test_a_checkpoint_is_trained_further_in_its_new_parts_or_in_all(
    tmp_path: Path, only: str
) -> None:
    start = grown(tmp_path)
    before = weights(start.model)
    after = weights(train(start, SKILL, config(only=only), tmp_path / "run").model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set(start.new_parameters) if only == "new" else set(before))

    # The new parameters are still marked as new.
    final = load_checkpoint(tmp_path / "run" / "final")
    assert final.new_parameters == start.new_parameters
    assert final.provenance["start"] == start.weights_digest


def test_training_starts_from_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    start = grown(tmp_path, seed=5)
    run = Trainer(start.model, SKILL, config(only="new"), start)
    batch = SKILL.batch(0, 4, 16, seed=0)
    expected = Trainer(build(spec(), seed=5), SKILL, CONFIG).backward(batch)
    assert run.backward(batch) == pytest.approx(expected, rel=1e-6)


def test_the_optimizer_knows_the_new_parts_alone_and_decays_their_matrices(tmp_path: Path) -> None:
    start = grown(tmp_path)
    run = Trainer(start.model, SKILL, config(only="new"), start)
    run.run(2)
    moments = {key.split("/")[1] for key in run.state() if key.startswith("optimizer/")}
    assert moments == start.new_parameters
    names = {id(p): name for name, p in run.model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in run.optimizer.param_groups)
    assert all("bodies" in name and "norm" not in name for name in decayed)
    assert decayed
    assert {name for name in others if "bodies" not in name} == {
        name for name in start.new_parameters if "encoding" in name or "router" in name
    }
    assert all(p.grad is None for p in run.model.parameters() if names[id(p)] not in moments)


def test_a_run_from_a_checkpoint_goes_on_and_from_another_one_it_does_not(tmp_path: Path) -> None:
    only_new = config(only="new")
    whole = train(grown(tmp_path / "a"), SKILL, only_new, tmp_path / "whole")
    with pytest.raises(Killed):
        train(grown(tmp_path / "a"), HookedData(SKILL.skill, 7, kill), only_new, tmp_path / "run")
    with pytest.raises(RunMismatchError, match=r"start: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now"):
        train(grown(tmp_path / "b", seed=1), SKILL, only_new, tmp_path / "run")
    with pytest.raises(RunMismatchError, match=r"config.only: 'new' there, 'all' now"):
        train(grown(tmp_path / "a"), SKILL, CONFIG, tmp_path / "run")
    again = train(grown(tmp_path / "a"), SKILL, only_new, tmp_path / "run")
    assert again.resumed_from == 5
    assert same(whole.model, again.model)


def test_where_nothing_is_new_that_alone_cannot_be_trained(tmp_path: Path) -> None:
    grown(tmp_path)
    with pytest.raises(ArchdslError, match=r"only: new trains .*does not start from a checkpoint"):
        train(spec(), SKILL, config(only="new"))
    with pytest.raises(ArchdslError, match=rf"but {tmp_path}/base has none; use only: all"):
        train(load_checkpoint(tmp_path / "base"), SKILL, config(only="new"))
    forged = replace(load_checkpoint(tmp_path / "base"), provenance={"retrofit": {"new": ["no"]}})
    with pytest.raises(CheckpointError, match="does not name its new parameters as the model does"):
        train(forged, SKILL, config(only="new"))


# Errors


def poison(model: LanguageModel, factor: float) -> Callable[[], None]:
    """Return a function that, once called, makes the model multiply its logits by ``factor``."""

    def start() -> None:
        model.norm.register_forward_hook(lambda module, inputs, x_BTD: x_BTD * factor)

    return start


@pytest.mark.parametrize(("factor", "found"), [(math.nan, "nan"), (math.inf, "nan|inf")])
def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(
    tmp_path: Path, factor: float, found: str
) -> None:
    model = build(spec())
    bad = HookedData(SKILL.skill, 7, poison(model, factor))
    said = (
        rf"step 8: the loss is ({found}); try a lower lr .* last good checkpoint is .*step-000005"
    )
    with pytest.raises(TrainingDiverged, match=said):
        train(model, bad, CONFIG, tmp_path)
    good = trainer()
    good.run(7)
    assert same(model, good.model)
    good = trainer()
    good.run(5)
    assert same(load_checkpoint(tmp_path / "checkpoints" / "step-000005").model, good.model)


def test_a_gradient_that_is_no_number_stops_too() -> None:
    run = trainer()

    def explode(grad: Tensor) -> Tensor:
        return grad * math.inf if run.step == 2 else grad

    run.model.head.weight.register_hook(explode)
    before: list[dict[str, Tensor]] = []
    with pytest.raises(TrainingDiverged, match=r"step 3: the norm of the gradient is (nan|inf)"):
        run.run(on_step=lambda step: before.append(weights(run.model)))
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert all(torch.equal(before[1][k], v) for k, v in weights(run.model).items())


def test_a_loss_that_stays_absurd_stops_and_leaves_the_checkpoints_from_before(
    tmp_path: Path,
) -> None:
    model = build(spec())
    bad = HookedData(SKILL.skill, 12, poison(model, 1e4))
    settings = config(steps=200, checkpoint_every=2, keep_last=1, eval_every=0)
    with pytest.raises(
        TrainingDiverged, match=r"step 62: .*after a minimum of [12]\.\d\d.*step-000012"
    ):
        train(model, bad, settings, tmp_path)


def test_absurd_losses_that_pass_are_let_pass() -> None:
    run = trainer(steps=100)
    absurd = {*range(5, 45), *range(50, 90)}  # longer than the patience, but not in a row

    def exaggerate(module: object, inputs: object, x_BTD: Tensor) -> Tensor:
        return x_BTD * 1e4 if run.step in absurd else x_BTD

    run.model.norm.register_forward_hook(exaggerate)
    run.run()
    assert run.step == 100


def test_weights_without_finite_values_are_never_saved(tmp_path: Path) -> None:
    run = trainer()
    with torch.no_grad():
        run.model.head.weight[0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match=r"head.weight has values that are not finite"):
        run.save(tmp_path / "bad")
    assert not list(tmp_path.iterdir())


class Silent(SkillData):
    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        batch = super().batch(index, batch_size, context, seed)
        return replace(batch, targets_BT=torch.full_like(batch.targets_BT, IGNORE))


def test_mistakes_are_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ArchdslError, match=r"only a vocab_size of 2"):
        train(spec("vocab_size=2"), SKILL, CONFIG)
    with pytest.raises(ArchdslError, match=r"a context of 99 tokens was requested"):
        train(spec(), SKILL, config(context=99))
    with pytest.raises(ArchdslError, match=r"batch 0 of skill:p-hop.* has no target to predict"):
        train(spec(), Silent(SKILL.skill), CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used as the folder of a run"):
        train(spec(), SKILL, CONFIG, tmp_path / "file")


# The display


def test_nothing_is_shown_unasked_and_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(spec(), SKILL, CONFIG)
    assert capsys.readouterr() == ("", "")
    train(spec(), SKILL, CONFIG, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 3  # two validations and the last step
    assert "step 6: validation loss" in shown.err
    assert "step 12/12  loss" in shown.err
    assert "routed" in shown.err


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    train(spec(), SKILL, CONFIG, progress=True)
    shown = capsys.readouterr().err
    assert "━" in shown
    assert "12/12" in shown
    assert "tokens/s" in shown
