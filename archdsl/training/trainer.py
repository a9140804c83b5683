"""Training in memory, step by step; ``archdsl.training.run`` keeps its log and its checkpoints.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from archdsl.data.types import IGNORE, Batch, Data
from archdsl.errors import ArchdslError
from archdsl.evaluation.evaluate import Evaluation, check_data_fits, evaluate, seed_torch
from archdsl.model.checkpoint import Checkpoint, load_training, load_weights, save_checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.training.config import TrainConfig

PATIENCE = 50  # steps in a row that a loss may be absurd before the run is given up

# may differ between a run and its continuation: no weight depends on them
UNCHECKED_SETTINGS = {"eval_every", "eval_tokens", "checkpoint_every", "keep_last", "log_every"}


class TrainingDiverged(ArchdslError):  # noqa: N818  it says what happened
    """The loss or its gradient is no number any more, or far above what it was."""


class RunMismatchError(ArchdslError):
    """A checkpoint that another spec, config or data made."""

    exit_status = 2


@dataclass(frozen=True)
class TrainStep:
    """What one optimizer step was: ``loss`` in nats per asked token, before the update."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class Trainer:
    """A training run in memory that goes on from wherever it stands.

    Every step draws its data and its random numbers from the seed and its own number. So a run
    can be stopped, interleaved with others and resumed without a change in any bit (on a CPU).
    ``start``: the checkpoint that ``model`` comes from, if any.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: Data,
        config: TrainConfig,
        start: Checkpoint | None = None,
    ) -> None:
        self.device = _device(config.device)
        self.context = config.context or model.spec.context
        check_data_fits(model.spec, data, self.context)
        self.model = model.to(self.device)
        self.data = data
        self.config = config
        self.start = start
        if config.only == "new":
            _freeze_the_rest(model, start)
        self.optimizer = _optimizer(model, config)
        self.step = 0
        self.tokens = 0
        self.lowest_loss = math.log(model.spec.vocab_size)  # guessing
        self.absurd_steps = 0
        model.checkpoint_activations = config.activation_checkpointing
        if config.compile:
            compile_layers(model)

    def run(
        self, until_step: int | None = None, on_step: Callable[[TrainStep], None] | None = None
    ) -> None:
        """Trains up to and including ``until_step`` (default: the last of the config).

        ``on_step`` may raise to stop: the trainer then stands after that step. Raises
        TrainingDiverged, with the weights as they were before the step that failed.
        """
        last = self.config.steps if until_step is None else min(until_step, self.config.steps)
        self.model.train()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            while self.step < last:
                step = self._advance()
                if on_step is not None:
                    on_step(step)

    def _advance(self) -> TrainStep:
        started, config = time.perf_counter(), self.config
        seed_torch(_mix(config.seed, self.step), self.device)
        batch = self.data.batch(self.step, config.batch_size, self.context, config.seed)
        loss = self.backward(batch)
        grad_norm = float(
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        )
        self._refuse_divergence(loss, grad_norm)
        lr = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.model.commit()
        self.step += 1
        self.tokens += batch.tokens_BT.numel()
        seconds = time.perf_counter() - started
        return TrainStep(self.step, batch.tokens_BT.numel(), loss, lr, grad_norm, seconds)

    def backward(self, batch: Batch) -> float:
        """Leaves the gradient of the mean loss over all asked tokens, and returns that mean."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.add_gradient(batch)

    def add_gradient(self, batch: Batch) -> float:
        """The same, on top of the gradient that is there."""
        asked = int((batch.targets_BT != IGNORE).sum())
        if not asked:
            raise ArchdslError(f"batch {self.step} of {self.data.name} asks for no prediction")
        parts = zip(
            batch.tokens_BT.chunk(self.config.accumulate),
            batch.targets_BT.chunk(self.config.accumulate),
            strict=True,
        )
        return sum(self._backward_part(tokens, targets, asked) for tokens, targets in parts)

    def _backward_part(self, tokens_BT: Tensor, targets_BT: Tensor, asked: int) -> float:
        with self.autocast():
            nats = self.model.loss(tokens_BT.to(self.device), targets_BT.to(self.device))
        loss = nats / asked
        of_routers = sum(self.model.trace.losses.values()) / self.config.accumulate
        (loss + of_routers).backward()
        return float(loss.detach())

    def autocast(self) -> torch.autocast:
        dtype = self.config.dtype
        half = dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _refuse_divergence(self, loss: float, grad_norm: float) -> None:
        guessing = math.log(self.model.spec.vocab_size)
        if not math.isfinite(loss):
            self._give_up(f"the loss is {loss}")
        if not math.isfinite(grad_norm):
            self._give_up(f"the norm of the gradient is {grad_norm}")
        self.absurd_steps = self.absurd_steps + 1 if loss > self.lowest_loss + guessing else 0
        if self.absurd_steps >= PATIENCE:
            self._give_up(f"the loss is {loss:.2f} and was {self.lowest_loss:.2f}")
        self.lowest_loss = min(loss, self.lowest_loss)

    def _give_up(self, what: str) -> NoReturn:
        raise TrainingDiverged(
            f"step {self.step + 1}: {what}; "
            f"try a lower lr (now {self.config.lr:g}) "
            f"or more warmup_steps (now {self.config.warmup})"
        )

    def evaluate(self) -> Evaluation:
        """On the validation split. Raises TrainingDiverged if the loss is no finite number."""
        config = self.config
        with self.autocast():
            evaluation = evaluate(
                self.model,
                self.data,
                batch_size=config.batch_size // config.accumulate,
                context=self.context,
                limit_tokens=config.eval_tokens,
            )
        if not math.isfinite(evaluation.loss):
            self._give_up(f"the validation loss is {evaluation.loss}")
        return evaluation

    def state(self) -> dict[str, Any]:
        """Where training stands, the weights apart: tensors and JSON values by name."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lowest_loss": self.lowest_loss,
            "absurd_steps": self.absurd_steps,
            "made_by": self._made_by(),
            **self._optimizer_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a ``state()`` of the same run; the weights are the caller's."""
        self.step = int(state["step"])
        self.tokens = int(state["tokens"])
        self.lowest_loss = float(state["lowest_loss"])
        self.absurd_steps = int(state["absurd_steps"])
        places = {name: index for index, name in enumerate(self._parameter_names())}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, moment = key.removeprefix("optimizer/").rpartition("/")
            if name in places:
                moments.setdefault(places[name], {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _optimizer_state(self) -> dict[str, Tensor]:
        names = self._parameter_names()
        return {
            f"optimizer/{names[index]}/{key}": tensor
            for index, moments in self.optimizer.state_dict()["state"].items()
            for key, tensor in moments.items()
        }

    def _parameter_names(self) -> list[str]:
        """In the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [names[id(parameter)] for group in groups for parameter in group["params"]]

    def _made_by(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude=UNCHECKED_SETTINGS)
        return {
            "config": config | {"device": self.device.type},
            "spec": self.model.spec.canonical().model_dump(mode="json"),
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            **({"start": self.start.weights_digest} if self.start else {}),
        }

    def check_same_run(self, state: Mapping[str, Any], path: Path) -> None:
        """Raises RunMismatchError, naming what differs, unless ``state`` is of this run."""
        given = json.loads(json.dumps(self._made_by()))
        differing = "\n".join(differences(state.get("made_by"), given))
        if differing:
            raise RunMismatchError(
                f"{path} belongs to another run; choose another folder, or delete that one:\n"
                + differing
            )

    def save(self, path: Path) -> None:
        """Writes a checkpoint that ``load`` goes on from, bit for bit."""
        self._save(path, self.state())

    def save_final(self, path: Path, validation: Evaluation) -> None:
        """Writes a checkpoint without what only further training needs."""
        state = {k: v for k, v in self.state().items() if not isinstance(v, Tensor)}
        self._save(path, state | {"validation": validation.model_dump(mode="json")})

    def _save(self, path: Path, state: Mapping[str, Any]) -> None:
        spoilt = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if spoilt:
            self._give_up(f"the update before it left {spoilt[0]} without finite values")
        save_checkpoint(
            path,
            self.model,
            tokenizer_from=self.data,
            provenance={
                "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
                "seed": self.config.seed,
                "step": self.step,
                **self._origin(),
            },
            training=state,
        )

    def _origin(self) -> dict[str, Any]:
        if self.start is None:
            return {}
        grown = self.start.provenance.get("retrofit")  # its new parameters stay new
        return {"start": self.start.weights_digest} | ({"retrofit": grown} if grown else {})

    def load(self, path: Path) -> None:
        """Goes on where ``save`` stood. Raises CheckpointError or RunMismatchError."""
        state = load_training(path)
        self.check_same_run(state, path)
        load_weights(path, self.model)
        self.restore(state)


def differences(stored: Any, given: Any, path: str = "") -> Iterator[str]:
    """One line for each place in which two trees of JSON values differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in stored | given:
            at = f"{path}.{key}" if path else key
            yield from differences(stored.get(key), given.get(key), at)
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from differences(*pair, f"{path}.{index}")
    elif stored != given:
        yield f"  {path}: {stored!r:.80} there, {given!r:.80} now"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ArchdslError(f"device {name!r}: no CUDA device is available; use cpu")
    return torch.device(name)


def compile_layers(model: LanguageModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Each by itself and in one graph, at shapes that do not change; an error where that cannot be.

    Plain layers share a graph, each loop has its own, another one for every mode of scoring.
    """
    limit = 4 * (1 + len(model.layers))
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend, recompile_limit=limit)


def _mix(seed: int, step: int) -> int:
    """One random seed out of two numbers; neighbours give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest())


def _freeze_the_rest(model: LanguageModel, start: Checkpoint | None) -> None:
    new = start.new_parameters if start else frozenset()
    if not new:
        found = f"{start.path} has none" if start else "the model starts from no checkpoint"
        raise ArchdslError(
            f"only: new trains what `archdsl retrofit` added to a checkpoint, and {found}; "
            "only: all trains everything"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)


def _optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the blocks and the head, nothing else."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) in matrices]
    others = [p for p in trained if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # fused: a quarter of the time of the default on a CPU
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
