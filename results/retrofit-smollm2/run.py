"""Do thinking steps that are grafted onto SmolLM2-135M help on text it is trained on briefly?

    python results/retrofit-smollm2/run.py CHECKPOINT

CHECKPOINT is what `archdsl import` made of SmolLM2-135M. The arms see the same windows in the same
order; each trains 12,096 parameters or fewer, and all else stays as it was:

    thinking    ITT on three layers: phi and routers
    random      the same loops with a random choice of tokens: phi
    gains       no thinking: the gains of all norms from layer 20 on, as many parameters

The learning rate of each is the best of three on the validation split, with another seed. The test
split is scored afterwards, on the same windows for all. Every figure goes to windows.jsonl as it is
made, so that the same command goes on where it was stopped.

Shapes: W windows, S seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import archdsl
from archdsl.costs.receipt import cost
from archdsl.data.loading import load_data
from archdsl.evaluation.evaluate import asking, score, undisturbed
from archdsl.interop.retrofit import logit_difference, parse_overlay, retrofit
from archdsl.lang.source import override, read
from archdsl.model.checkpoint import Checkpoint, load_checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.training.run import TrainConfig, train

HERE = Path(__file__).parent
LAYERS = [20, 23, 26]
STEPS, SEEDS, TUNING_SEED = 32, (0, 1, 2), 100
RATES = (3e-3, 1e-2, 3e-2)
CONFIG = TrainConfig(
    batch_size=2, context=256, dtype="bfloat16", only="new", eval_every=0, eval_tokens=256
)
WINDOWS = {"validation": 16, "test": 48}

Line = dict[str, Any]


def thinking(base: Checkpoint, seed: int, *changes: str) -> Checkpoint:
    tree = override(read("itt-overlay"), [f"layers={LAYERS}", *changes])
    grown = retrofit(base, parse_overlay(tree), seed=seed)
    return Checkpoint(base.path, grown.model, grown.provenance)


def random(base: Checkpoint, seed: int) -> Checkpoint:
    return thinking(base, seed, f"loop.router={{kind: random, capacity: 0.7, seed: {seed}}}")


def gains(base: Checkpoint, seed: int) -> Checkpoint:
    late = tuple(f"blocks.0.blocks.{i}." for i in range(LAYERS[0], 30))
    names = [
        name
        for name, _ in base.model.named_parameters()
        if name == "norm.weight" or (name.startswith(late) and "norm" in name)
    ]
    return replace(base, provenance={"retrofit": {"new": names}})


ARMS: dict[str, Callable[[Checkpoint, int], Checkpoint]] = {
    "thinking": thinking,
    "random": random,
    "gains": gains,
}
RATE_OF = {"random": "thinking"}  # both train phi: the rate is looked for once


class Experiment:
    """Losses of windows by arm, seed, rate and split; what is not known is trained and scored."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, HERE / "windows.jsonl"
        self.base = load_checkpoint(path)
        self.data = load_data(None, tokenizer=str(self.base.tokenizer))
        text = self.file.read_text() if self.file.exists() else ""
        self.known = [json.loads(line) for line in text.splitlines()]

    def losses(self, **of: Any) -> np.ndarray:
        """Nats per token of each window, [W]."""
        for line in self.known:
            if all(line.get(key) == value for key, value in of.items()):
                return np.array(line["loss_W"])
        self.measure(of)
        return self.losses(**of)

    def measure(self, of: Line) -> None:
        if of["arm"] == "base":
            return self.note(of, self.base.model)
        start = ARMS[of["arm"]](load_checkpoint(self.path), of["seed"])
        changes = {key: of[key] for key in ("seed", "lr", "steps")}
        model = train(start, self.data, CONFIG.model_copy(update=changes), progress=True).model
        self.note(of, model)
        if of["arm"] != "gains" and of["split"] == "test":
            model.dial(capacity=0)
            self.note(of | {"arm": f"{of['arm']}, further steps skipped"}, model)
        return None

    def note(self, of: Line, model: LanguageModel) -> None:
        split = of["split"]
        with undisturbed(model):
            batches = self.data.held_out(split, 4, 256, 256 * WINDOWS[split])
            loss_W, asked_W, _ = asking([score(model, b) for b in batches], self.data, split)
        mean_W = (loss_W / asked_W).tolist()
        self.known.append(of | {"loss_W": [round(loss, 6) for loss in mean_W]})
        with self.file.open("a") as file:
            file.write(json.dumps(self.known[-1]) + "\n")
        print(of, f"{np.mean(mean_W):.4f}", flush=True)

    def rate(self, arm: str) -> float:
        """The best of the rates, by the validation split."""
        tuning = {"arm": RATE_OF.get(arm, arm), "seed": TUNING_SEED, "steps": STEPS}
        means = {lr: self.losses(split="validation", lr=lr, **tuning).mean() for lr in RATES}
        return min(means, key=lambda lr: means[lr])

    def tested(self, arm: str, seed: int) -> np.ndarray:
        """[W]"""
        trained = arm.partition(",")[0]
        at = {"split": "test", "seed": seed, "steps": STEPS, "lr": self.rate(trained)}
        self.losses(arm=trained, **at)  # what is dialled is measured along with it
        return self.losses(arm=arm, **at)


def difference(left_SW: np.ndarray, right_SW: np.ndarray) -> Line:
    """The mean of left - right, its standard error over windows, and that of each seed."""
    of_SW = left_SW - right_SW
    of_W = of_SW.mean(0)
    return {
        "mean": round(float(of_W.mean()), 5),
        "standard_error": round(float(of_W.std(ddof=1) / math.sqrt(len(of_W))), 5),
        "by_seed": [round(float(of_S), 5) for of_S in of_SW.mean(1)],
    }


def facts(path: Path) -> Line:
    """What the graft is, before any training."""
    base = load_checkpoint(path)
    grown = thinking(base, 0).model
    counted = {"before": cost(base.spec), "after": cost(grown.spec)}
    return {
        "base": base.provenance,
        "layers": LAYERS,
        "logits_differ_by": logit_difference(base.model, grown),
        "new_parameters": {
            arm: new_count(make(load_checkpoint(path), 0)) for arm, make in ARMS.items()
        },
        "parameters": {when: found.params for when, found in counted.items()},
        "flops_per_token": {when: found.expected for when, found in counted.items()},
    }


def new_count(start: Checkpoint) -> int:
    weights = dict(start.model.named_parameters())
    return sum(weights[name].numel() for name in start.new_parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", choices=ARMS, help="measure one arm, beside another process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Experiment(given.checkpoint)
    if given.only:
        for seed in SEEDS:
            run.tested(given.only, seed)
        return
    arms = [*ARMS, "thinking, further steps skipped", "random, further steps skipped"]
    loss = {"base": run.losses(arm="base", split="test")[None]}
    tested = {(seed, arm): run.tested(arm, seed) for seed in SEEDS for arm in arms}
    loss |= {arm: np.stack([tested[seed, arm] for seed in SEEDS]) for arm in arms}
    result = {
        "graft": facts(given.checkpoint),
        "training": CONFIG.model_dump(mode="json") | {"steps": STEPS, "seeds": SEEDS},
        "rates": {arm: run.rate(arm) for arm in ARMS},
        "windows": WINDOWS,
        "data": {"name": run.data.name, "fingerprint": run.data.fingerprint},
        "test_loss": {arm: [round(float(x), 5) for x in of.mean(1)] for arm, of in loss.items()},
        "minus_base": {arm: difference(loss[arm], loss["base"]) for arm in arms},
        "minus_gains": {
            arm: difference(loss[arm], loss["gains"]) for arm in ("thinking", "random")
        },
        "thinking_minus_random": difference(loss["thinking"], loss["random"]),
        "versions": {
            "archdsl": archdsl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
