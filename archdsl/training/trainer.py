"""Train a model in memory, step by step. The log and the files are in `archdsl.training.run`.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from archdsl.blocks.loop import LoopSpec
from archdsl.data.types import IGNORE, Batch, Data
from archdsl.errors import ArchdslError, blamed_on
from archdsl.evaluation.evaluate import Evaluation, check_data_fits, evaluate
from archdsl.lang.spec import walk
from archdsl.lang.training import LEVELS
from archdsl.model.checkpoint import (
    TENSORS,
    TRAINING,
    Checkpoint,
    CheckpointError,
    check_weights,
    load_training,
    load_weights,
    one_of_each,
    read_tensors,
    save_checkpoint,
    stored_state,
)
from archdsl.model.language_model import LanguageModel
from archdsl.nn.devices import (
    BFLOAT16,
    device_named,
    random_state_kept,
    require_compiler,
    seed_torch,
)
from archdsl.nn.ranks import Ranks, local, whole
from archdsl.training.config import TrainConfig, usual_warmup
from archdsl.training.depth import at_depth, losses_of_steps
from archdsl.training.optimizers import Optimizer
from archdsl.training.parallel import (
    gathered,
    give_back,
    part_of_batch,
    shard,
    share_statistics,
)
from archdsl.training.sharded import ShardWriter
from archdsl.training.state import PREFIX, TrainingState, checked, empty_moments, moments

IN_MEMORY = Path("the state")  # in errors, where a state was not read from a checkpoint
PATIENCE = 50  # steps in a row with a far too high loss before training is stopped

# Settings that may differ between a run and its continuation, as no weight depends on them.
UNCHECKED_SETTINGS = {
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "keep_last",
    "log_every",
    "log",
    "loss_per_step",
    "peak_flops",
    "profile",
    "parallel",
}


class TrainingDiverged(ArchdslError):  # noqa: N818  the name states what happened
    """The loss, its gradient or the weights are not finite, or the loss stays far too high."""


class RunMismatchError(ArchdslError):
    """A checkpoint was made with another spec, config, data or start."""

    exit_status = 2


@dataclass(frozen=True)
class TrainStep:
    """The figures of one optimizer step.

    ``step``: its number, counted from 1. ``tokens``: the tokens of the batch.
    ``loss``: nats per target position, before the update. ``lr``: the learning rate.
    ``grad_norm``: the norm of the gradient before clipping. ``seconds``: wall-clock time.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class Trainer:
    """A training run in memory that can be stopped and resumed after every step.

    The data and the random numbers of a step depend only on the seed and the number of the step.
    So a run that is stopped, interleaved with others and resumed gives the same bits as one that
    is not (on a CPU).

    ``start``: the checkpoint that ``model`` was loaded from, if any. ``horizon``: the steps that a
    schedule of capacities is a share of; default: those of the config. ``ranks``: the processes
    that train the model together, all of which call the same methods; default: this one alone.
    Raises ArchdslError if the data do not fit the model, the batch cannot be divided among the
    processes, the device is not available, or ``only: new`` has nothing to train.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: Data,
        config: TrainConfig,
        start: Checkpoint | None = None,
        horizon: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if ranks is None:
            with blamed_on("device"):
                ranks = Ranks(device_named(config.device))
        self.ranks, self.device = ranks, ranks.device
        self._check_batch_size(config)
        self.context = config.context or model.spec.context
        check_data_fits(model.spec, data, self.context)
        self.model = model
        self.data = data
        self.config = config
        self.start = start
        if config.only == "new":
            with blamed_on("only"):
                _freeze_old_parameters(model, start)
        self.depth = model.spec.depth_law
        self.capacity = model.spec.training.capacity if model.spec.training else None
        self.horizon = horizon or config.steps
        self.draws_noise = any(_starts_with_noise(part) for _, part in walk(model.spec))
        in_step = self.depth is None or self.depth.per == "batch"
        many = config.accumulate > 1 or not in_step
        self.writer = ShardWriter(ranks) if ranks.size > 1 else None
        self.units = shard(model, ranks, parts=many, in_step=in_step)
        self.optimizer = Optimizer(model, config)
        self.step = 0
        self.tokens = 0
        self.lowest_loss = math.log(model.spec.vocab_size)  # the loss of a uniform guess
        self.diverging_steps = 0  # steps in a row with a far too high loss
        model.checkpoint_activations = config.activation_checkpointing
        if config.compile:
            with blamed_on("compile"):
                require_compiler(self.device)
            depths = len(set(model.spec.training_depths))
            if config.loss_per_step and model.loops:
                depths += len(model.loops[-1].passes)
            if self.depth and self.depth.per == "sequence":
                depths *= 2  # the number of sequences with a depth differs by one between steps
            compile_layers(model, depths=depths + (LEVELS if self.capacity else 0))

    def run(
        self, until_step: int | None = None, on_step: Callable[[TrainStep], None] | None = None
    ) -> None:
        """Train up to and including ``until_step`` (default: the last step of the config).

        ``on_step`` is called after each step. It may raise an exception to stop: the step is then
        complete. Raises TrainingDiverged if the loss or the gradient is not finite or the loss
        stays far too high; the weights are then those before the step that failed.
        """
        last = self.config.steps if until_step is None else min(until_step, self.config.steps)
        self.model.train()
        with random_state_kept(self.device):
            while self.step < last:
                step = self._advance()
                if on_step is not None:
                    on_step(step)

    def _check_batch_size(self, config: TrainConfig) -> None:
        if config.batch_size % (config.accumulate * self.ranks.size):
            parts = f" x accumulate ({config.accumulate})" if config.accumulate > 1 else ""
            with blamed_on("batch_size"):
                raise ArchdslError(
                    f"a batch of {config.batch_size} sequences cannot be divided evenly among the "
                    f"processes ({self.ranks.size}){parts}; use a multiple of "
                    f"{config.accumulate * self.ranks.size}"
                )

    def _advance(self) -> TrainStep:
        started, config = time.perf_counter(), self.config
        seed_torch(_step_seed(config.seed, self.step), self.device)
        batch = self.data.batch(self.step, config.batch_size, self.context, config.seed)
        [loss] = self.ranks.sum(self.backward(batch))
        grad_norm = float(
            whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        )
        self._refuse_divergence(loss, grad_norm)
        lr = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        share_statistics(self.model, self.ranks)
        self.model.commit()
        self.step += 1
        self.tokens += batch.tokens_BT.numel()
        seconds = time.perf_counter() - started
        return TrainStep(self.step, batch.tokens_BT.numel(), loss, lr, grad_norm, seconds)

    def backward(self, batch: Batch) -> float:
        """Compute the gradient of the loss on ``batch``.

        Returns the loss in nats, averaged over all target positions of the batch; with several
        processes, the part of it that comes from the rows of this process. Raises ArchdslError if
        the batch has no target.
        """
        self.optimizer.zero_grad(set_to_none=True)
        return self.add_gradient(batch)

    def add_gradient(self, batch: Batch) -> float:
        """Add the gradient of the loss on ``batch`` to the gradient that exists.

        Returns the loss as `backward` does. Raises ArchdslError if the batch has no target.
        """
        target_count = int((batch.targets_BT != IGNORE).sum())
        if not target_count:
            raise ArchdslError(f"batch {self.step} of {self.data.name} has no target to predict")
        total = 0.0
        parts = list(self._parts(len(batch.tokens_BT)))
        for number, (depth, rows) in enumerate(parts, 1):
            part = Batch(batch.tokens_BT[rows], batch.targets_BT[rows])
            last = self.depth.backprop_last if self.depth else None
            part_of_batch(self.units, last=number == len(parts))
            self.model.noise_B = self._noise(rows)
            with at_depth(self.model, depth, last, self._openness(self.step, self.horizon)):
                total += self._backward_part(part, target_count, len(batch.tokens_BT) / len(rows))
        return total

    def _openness(self, step: int, steps: int) -> float:
        return self.capacity.openness(step, steps) if self.capacity else 0.0

    def _parts(self, rows: int) -> Iterator[tuple[int | None, list[int]]]:
        """Yield the parts of a batch of so many rows that this process computes: the rows, and the
        number of passes of the loops in them.

        None: as many as the loops run now. Sequences of different depths are in different parts.
        """
        size = -(-rows // (self.config.accumulate * self.ranks.size))
        for depth, numbers in self._rows_by_depth(rows):
            for start in range(0, len(numbers), size):
                yield depth, numbers[start : start + size]

    def _rows_by_depth(self, rows: int) -> Iterator[tuple[int | None, list[int]]]:
        own = self.ranks.rows(rows)
        if self.depth is None:
            yield None, list(range(rows)[own])
            return
        steps = self.model.spec.loops[0].steps
        drawn = self.depth.draw(steps, rows, self.config.seed, self.step)
        # each process gets about as many rows of each depth as the others
        by_depth = sorted(range(rows), key=lambda row: drawn[row])[
            self.ranks.rank :: self.ranks.size
        ]
        for depth in sorted({drawn[row] for row in by_depth}):
            yield depth, [row for row in by_depth if drawn[row] == depth]

    def _noise(self, rows: list[int]) -> Tensor | None:
        """What the random numbers of each row are drawn by: they depend on its number alone."""
        if not self.draws_noise:
            return None
        seeds = [_seed(f"{self.config.seed}/{self.step}/{row}") for row in rows]
        return torch.tensor(seeds, device=self.device)

    def _backward_part(self, part: Batch, target_count: int, parts: float) -> float:
        """Add the gradient of one of ``parts`` equally large parts of a batch; return its loss."""
        with self.autocast():
            nats = self._nats(part.tokens_BT.to(self.device), part.targets_BT.to(self.device))
        loss = nats / target_count
        router_loss = sum(self.model.trace.losses.values()) / parts
        (loss + router_loss).backward()
        return float(loss.detach())

    def _nats(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed loss, as the spec says what it is of."""
        rule = self.model.spec.training
        if rule is None or rule.loss == "last":
            return self.model.loss(tokens_BT, targets_BT)
        return self.model.loss_of_passes(tokens_BT, targets_BT, rule.pass_weights)

    def autocast(self) -> torch.autocast:
        """Return a context for the forward pass in the data type of the config."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16)

    @property
    def in_bfloat16(self) -> bool:
        """Whether the arithmetic is in bfloat16."""
        dtype = self.config.dtype
        return dtype == "bfloat16" or (dtype == "auto" and self.device.type in BFLOAT16)

    def _refuse_divergence(self, loss: float, grad_norm: float) -> None:
        guess_loss = math.log(self.model.spec.vocab_size)
        if not math.isfinite(loss):
            self._give_up(f"the loss is {loss}")
        if not math.isfinite(grad_norm):
            self._give_up(f"the norm of the gradient is {grad_norm}")
        too_high = loss > self.lowest_loss + guess_loss
        self.diverging_steps = self.diverging_steps + 1 if too_high else 0
        if self.diverging_steps >= PATIENCE:
            self._give_up(f"the loss is {loss:.2f} after a minimum of {self.lowest_loss:.2f}")
        self.lowest_loss = min(loss, self.lowest_loss)

    def _give_up(self, what: str) -> NoReturn:
        raise TrainingDiverged(
            f"step {self.step + 1}: {what}; "
            f"try a lower lr (now {self.config.lr:g}) "
            f"or more warmup_steps (now {self.config.warmup})"
        )

    def evaluate(
        self,
        limit_tokens: int | None = None,
        watched: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Evaluation:
        """Evaluate on the validation split, or on its first ``limit_tokens`` tokens.

        ``watched``: gives the context of each forward pass whose scores count. Raises
        TrainingDiverged if the loss is not finite.
        """
        config = self.config
        with self.autocast():
            evaluation = evaluate(
                self.model,
                self.data,
                batch_size=self._rows_at_once,
                context=self.context,
                limit_tokens=limit_tokens or config.eval_tokens,
                ranks=self.ranks,
                watched=watched,
            )
        give_back(self.units)
        if not math.isfinite(evaluation.loss):
            self._give_up(f"the validation loss is {evaluation.loss}")
        return evaluation

    @property
    def _rows_at_once(self) -> int:
        """The sequences that this process has in memory in training."""
        return self.config.batch_size // (self.config.accumulate * self.ranks.size)

    def loss_of_steps(self) -> list[float]:
        """Return the loss on a batch of the validation split with the last loop ended after 1, 2,
        ... steps, in nats per target; empty if there is no loop."""
        size = self._rows_at_once
        tokens = size * self.context
        batch = next(iter(self.data.held_out("validation", size, self.context, tokens)))
        with self.autocast():
            losses = losses_of_steps(self.model, batch, sharded=self.ranks.size > 1)
        give_back(self.units)
        return losses

    def state(self) -> dict[str, Any]:
        """Return the state of training without the weights: tensors and JSON values by name."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lowest_loss": self.lowest_loss,
            "absurd_steps": self.diverging_steps,
            "made_by": self._made_by(),
            **self._optimizer_state(),
        }

    def restore(self, state: Mapping[str, Any], path: Path = IN_MEMORY) -> None:
        """Restore a ``state()`` of the same run. The caller loads the weights.

        ``path``: the checkpoint that it was read from. Raises CheckpointError if something is
        missing or cannot be; then nothing is changed.
        """
        self._restore(*self._checked(state, path))

    def _checked(
        self, state: Mapping[str, Any], path: Path
    ) -> tuple[TrainingState, dict[str, dict[str, Tensor]]]:
        stood = checked(TrainingState, state, path)
        if stood.step > self.config.steps:
            most = f"must be at most {self.config.steps}, the steps of the run"
            raise CheckpointError(f"{path / TRAINING}: step: {most}, got {stood.step}")
        kept = self.optimizer.moments
        return stood, moments(state, self.optimizer.parameters, kept, stood, path)

    def _moments_at(self, path: Path, stood: TrainingState) -> dict[str, Tensor]:
        """Read the state of the optimizer, which may be divided there and is divided here."""
        wanted = empty_moments(self.optimizer.parameters, self.optimizer.moments, stood)
        read_tensors(path, wanted, together=self.ranks.size > 1)
        return wanted

    def _restore(self, stood: TrainingState, found: dict[str, dict[str, Tensor]]) -> None:
        self.step, self.tokens = stood.step, stood.tokens
        self.lowest_loss, self.diverging_steps = stood.lowest_loss, stood.absurd_steps
        self.optimizer.restore(found)

    def _optimizer_state(self) -> dict[str, Any]:
        found = self.optimizer.state()
        without = [name for name in self.optimizer.parameters if name not in found]
        tensors = {
            f"{PREFIX}{name}/{key}": tensor
            for name, kept in found.items()
            for key, tensor in kept.items()
        }
        return tensors | ({"without_moments": without} if without else {})

    def _made_by(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude=UNCHECKED_SETTINGS)
        return {
            "config": config | {"device": self.device.type},
            "spec": self.model.spec.canonical().model_dump(mode="json"),
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            **({"start": self.start.weights_digest} if self.start else {}),
        }

    def check_same_run(self, state: Mapping[str, Any], path: Path) -> None:
        """Raises RunMismatchError if ``state``, read from ``path``, belongs to another run.

        The message lists the differences. Raises CheckpointError if the state is damaged.
        """
        found = list(differences(_made_by(checked(TrainingState, state, path)), self._given()))
        if found:
            refused = f"{path} belongs to another run; use another folder, or delete that one:"
            fewer = not self.has_more_steps_than(state, path)
            raise RunMismatchError("\n".join([refused, *found, *_about_steps(found, path, fewer)]))

    def _given(self) -> dict[str, Any]:
        given = dict(json.loads(json.dumps(self._made_by())))
        given["config"]["warmup_steps"] = self.config.warmup
        return given

    def has_more_steps_than(self, state: Mapping[str, Any], path: Path) -> bool:
        """Whether the run that ``state`` belongs to was to have fewer steps than this config.

        Raises CheckpointError if the state, which was read from ``path``, is damaged.
        """
        steps = _steps_of(checked(TrainingState, state, path))
        return steps is not None and steps < self.config.steps

    def can_go_on_from(self, state: Mapping[str, Any], path: Path) -> bool:
        """Whether ``state`` is one of this run, or of a run that differs only in its later steps.

        The second is so if only ``steps`` differs, and the learning rates so far do not. Raises
        CheckpointError if the state, which was read from ``path``, is damaged.
        """
        stood = checked(TrainingState, state, path)
        steps, given = _steps_of(stood), self._given()
        if steps is None or not stood.step <= self.config.steps:
            return False
        config = given["config"] | {"steps": steps}
        if list(differences(_made_by(stood), given | {"config": config})):
            return False
        before = self.config.model_copy(update={"steps": steps, "warmup_steps": self.config.warmup})
        return steps == self.config.steps or all(
            before.learning_rate(step) == self.config.learning_rate(step)
            and self._openness(step, steps) == self._openness(step, self.horizon)
            for step in range(stood.step)
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint that ``load`` resumes from with the same bits.

        Raises TrainingDiverged if a weight is not finite, CheckpointError if it cannot be written.
        """
        self._save(path, self.state())

    def wait(self) -> None:
        """Wait until the last checkpoint is written, which several processes do in the background.

        Raises CheckpointError if it cannot be.
        """
        if self.writer is not None:
            self.writer.wait()

    def close(self) -> None:
        """Wait for a checkpoint that is being written, whether or not it can be."""
        if self.writer is not None:
            self.writer.close()

    def save_final(self, path: Path, validation: Evaluation) -> None:
        """Write a checkpoint without the state of the optimizer.

        Raises TrainingDiverged if a weight is not finite, CheckpointError if it cannot be written.
        """
        state = {k: v for k, v in self.state().items() if not isinstance(v, Tensor)}
        self._save(path, state | {"validation": validation.model_dump(mode="json")}, final=True)

    def _save(self, path: Path, state: Mapping[str, Any], final: bool = False) -> None:
        parameters = self.model.named_parameters()
        not_finite = [name for name, p in parameters if not local(p).isfinite().all()]
        for name in (name for names in self.ranks.gather(not_finite) for name in names):
            self._give_up(f"after the last update {name} has values that are not finite")
        provenance = {
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "seed": self.config.seed,
            "step": self.step,
            **self._origin(),
        }
        write = partial(
            save_checkpoint, path, tokenizer_from=self.data, provenance=provenance, training=state
        )
        if self.writer is None:
            write(model=self.model)
        elif final:
            model = gathered(self.model, self.ranks)
            self.writer.wait()
            self.ranks.on_first(lambda: write(model=model))
        else:
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            tensors |= one_of_each(self.model)
            self.writer.write(path, tensors, lambda shards: write(model=self.model, shards=shards))

    def _origin(self) -> dict[str, Any]:
        if self.start is None:
            return {}
        # The new parameters of a retrofit are still new after training.
        retrofit = self.start.provenance.get("retrofit")
        return {"start": self.start.weights_digest} | ({"retrofit": retrofit} if retrofit else {})

    def load(self, path: Path) -> None:
        """Restore a checkpoint that ``save`` wrote.

        Raises RunMismatchError if it belongs to another run, CheckpointError if it cannot be read.
        """
        state = load_training(path)
        self.check_same_run(state, path)
        self.continue_from(path, state)

    def continue_from(self, path: Path, state: Mapping[str, Any]) -> None:
        """Restore the ``state`` that was read from ``path``, and the weights there.

        Raises CheckpointError if one of them is damaged; then nothing is changed.
        """
        if self.units or not (path / TENSORS).exists():
            state = dict(state) | self._moments_at(path, checked(TrainingState, state, path))
        load = self._weights_at(path)
        found = self.ranks.agree(lambda: self._checked(state, path))
        load()
        self._restore(*found)

    def load_weights(self, path: Path) -> None:
        """Replace the weights by those of a checkpoint.

        Raises CheckpointError if it is damaged; then nothing is changed.
        """
        self._weights_at(path)()

    def _weights_at(self, path: Path) -> Callable[[], None]:
        """Return what replaces the weights by those of a checkpoint, which is read and checked."""
        if not self.units:
            return lambda: load_weights(path, self.model)
        own = stored_state(path, self.model)
        found = {name: torch.empty_like(tensor) for name, tensor in own.items()}
        read_tensors(path, found, together=True)
        self.ranks.agree(lambda: check_weights(path, found, self.model))

        @torch.no_grad()
        def load() -> None:
            for name, tensor in found.items():
                own[name].copy_(tensor)

        return load


def differences(stored: Any, given: Any, path: str = "") -> Iterator[str]:
    """Yield one line for each difference between two trees of JSON values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in stored | given:
            at = f"{path}.{key}" if path else key
            yield from differences(stored.get(key), given.get(key), at)
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, pair in enumerate(zip(stored, given, strict=True)):
            yield from differences(*pair, f"{path}.{index}")
    elif stored != given:
        yield f"  {path}: {stored!r:.80} there, {given!r:.80} now"


def _made_by(stood: TrainingState) -> dict[str, Any]:
    """Return what a state says its run was made by, also the settings that came later."""
    found = stood.made_by
    config = found.get("config")
    if not isinstance(config, dict):
        return found
    config = TrainConfig.with_later(config, exclude=UNCHECKED_SETTINGS)
    if config.get("warmup_steps") is None and (steps := _steps_of(stood)) is not None:
        config["warmup_steps"] = usual_warmup(steps)
    return found | {"config": config}


def _steps_of(stood: TrainingState) -> int | None:
    """Return the number of steps that a run was to have; None if its state does not say it."""
    config = stood.made_by.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    return steps if type(steps) is int and steps > 0 else None


def _about_steps(found: list[str], path: Path, fewer: bool) -> list[str]:
    """Return what can be done if two runs differ in nothing but the number of steps."""
    if any(not line.startswith(("  config.steps:", "  config.warmup_steps:")) for line in found):
        return []
    anew = f"To start a new run from its weights: `archdsl train {path} --steps N --out FOLDER`."
    if fewer:
        return [f"A run does not go back to fewer steps. {anew}"]
    warmup = [line for line in found if "warmup_steps" in line]
    return [
        *(f"Give --warmup-steps {line.split()[1]}, as it was there." for line in warmup),
        "A run goes on to more steps from a checkpoint up to which its learning rates stay the "
        f"same: with the schedule constant, or with wsd before the rate falls. {anew}",
    ]


def compile_layers(
    model: LanguageModel, backend: str | Callable[..., Any] = "inductor", depths: int = 1
) -> None:
    """Compile each layer as one graph with fixed shapes.

    Equal layers without a loop share a graph. Each loop has its own graph, and more of them for
    other modes of its router and other ``depths``. Raises an error of torch if a layer cannot be
    one graph.
    """
    limit = (3 + max(1, depths)) * (1 + len(model.layers))
    # an argument of `compile` from torch 2.13 on
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)


def _step_seed(seed: int, step: int) -> int:
    """Derive the random seed of a step. Seeds of neighbouring steps are unrelated."""
    return _seed(f"{seed}/{step}")


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


def _starts_with_noise(part: object) -> bool:
    return isinstance(part, LoopSpec) and part.first_injects and part.start == "noise"


def _freeze_old_parameters(model: LanguageModel, start: Checkpoint | None) -> None:
    new = start.new_parameters if start else frozenset()
    if not new:
        reason = f"{start.path} has none" if start else "the run does not start from a checkpoint"
        raise ArchdslError(
            "only: new trains the parameters that `archdsl retrofit` added to a checkpoint, but "
            f"{reason}; use only: all to train all parameters"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)
