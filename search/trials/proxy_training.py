"""Train a proxy up to a rung. The training continues from the stored state and stores a new one."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from torch import Tensor

from archdsl.costs.receipt import train_flops
from archdsl.errors import ArchdslError
from archdsl.files import read_bytes, remove_folder, write_text
from archdsl.lang.messages import explain
from archdsl.lang.strict import Strict
from archdsl.model.checkpoint import load_training, save_checkpoint
from archdsl.nn.ranks import whole
from archdsl.search.trials.curve import Curve
from archdsl.search.trials.proxy_scoring import HeldOutScores, held_out
from archdsl.search.trials.result_store import StoredRun
from archdsl.training.parallel import gathered
from archdsl.training.state import TrainingState, checked
from archdsl.training.trainer import Trainer, TrainingDiverged, TrainStep

CURVE_SHARE = 8  # the held-out losses on the way are measured on so small a part of the tokens
SECONDS_APART = 30.0  # the least time between two states that are saved on the way to a rung


def _as_tuples(value: Any) -> Any:
    """Convert the lists of a JSON value to tuples."""
    return tuple(map(tuple, value)) if isinstance(value, list | tuple) else value


def as_tuple(value: Any) -> Any:
    """Convert the list of a JSON value to a tuple."""
    return tuple(value) if isinstance(value, list) else value


# fields of a score that differ between equal trainings
OF_THE_MACHINE = {"seconds", "step_seconds", "peak_bytes"}


class ProxyScore(Strict):
    """The held-out quality of a proxy after ``steps`` training steps.

    The evaluation is causal, even if the model sees future tokens in training. The seconds and
    FLOPs are those that this rung added to the rung below. ``reused``: whether the score was read
    from the result store, so that the call that returned it has spent nothing.
    """

    steps: int
    loss: float | None = Field(description="nats per prediction; null: training diverged")
    accuracy: float | None
    bits_per_byte: float | None
    leak: float = Field(0.0, description="how much lower the loss is with sight of the future")
    seconds: float = Field(description="spent")
    train_flops: float = Field(0.0, description="spent: by the closed form")
    eval_flops: float = Field(0.0, description="spent by scoring")
    flops_per_token: float | None = Field(None, description="forward, executed, when scored")
    shares: dict[str, float] = Field({}, description="of tokens selected, by loop and step")
    entropies: dict[str, float] = Field({}, description="of selecting a token, in bits")
    curve: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_as_tuples)] = Field(
        (), description="training: step, mean loss since the point before"
    )
    held_out: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_as_tuples)] = Field(
        (),
        exclude_if=lambda points: not points,  # as in scores of the first version
        description="on the way: step, loss on the first eighth of the held-out tokens",
    )
    step_seconds: float = Field(
        0.0,
        exclude_if=lambda seconds: not seconds,
        description="of all steps alone, with those of lower rungs",
    )
    peak_bytes: int = Field(0, description="of memory, of the process that needed most")
    accumulate: int = Field(1, description="parts that each batch was cut into")
    reused: bool = Field(False, exclude=True)


@dataclass
class SavedProgress:
    """What is saved with a state: the curves, and the seconds and FLOPs since the last score."""

    curve: Curve = field(default_factory=Curve)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    train_flops: float = 0.0


class StoredCurve(Strict):
    """The fields of a ``Curve``, as a state holds them."""

    points: list[Annotated[tuple[int, float], BeforeValidator(as_tuple)]]
    width: int = Field(ge=1)
    total: float
    count: int = Field(ge=0)


class StoredProgress(Strict):
    """The fields of a ``SavedProgress``, as a state holds them."""

    curve: StoredCurve
    held_out: list[Annotated[tuple[int, float], BeforeValidator(as_tuple)]] = Field([])
    seconds: float = Field(ge=0)
    step_seconds: float = Field(0.0, ge=0)
    train_flops: float = Field(ge=0)


class ProxyState(TrainingState):
    """Where the training of a proxy stood."""

    progress: StoredProgress


def read_score(file: Path) -> ProxyScore | None:
    """Read the score in a file and mark it as reused; None if the file does not exist.

    Raises ArchdslError if the file holds something else.
    """
    if not file.exists():
        return None
    try:
        score = ProxyScore.model_validate_json(read_bytes(file, ArchdslError))
    except ValidationError as error:
        field, why = explain(error, ProxyScore.model_fields)[0]
        what = f"{'.'.join(map(str, field))}: {why}" if field else "is no score"
        advice = "delete the file, and the proxy is scored again"
        raise ArchdslError(f"{file}: {what}; {advice}") from None
    return score.model_copy(update={"reused": True})


class ProxyTraining:
    """Train up to the last step of the trainer's config.

    Every ``held_out_every`` steps the loss on a part of the held-out data is measured (0: never).
    The score is measured on ``tokens`` held-out tokens (None: as many as the config says). All
    processes that train the model together call the same methods. The caller must hold the lock of
    ``stored_run``.
    """

    def __init__(
        self,
        stored_run: StoredRun,
        trainer: Trainer,
        heartbeat: Callable[[], None],
        held_out_every: int = 0,
        tokens: int | None = None,
    ) -> None:
        self.started = self.saved = time.perf_counter()
        self.stored_run, self.trainer, self.heartbeat = stored_run, trainer, heartbeat
        self.held_out_every, self.tokens = held_out_every, tokens
        self.config, self.ranks = trainer.config, trainer.ranks
        self.progress = SavedProgress()
        self.furthest = self._resume()
        self.step_flops = _step_flops(self.trainer)

    def _resume(self) -> bool:
        """Restore the stored state, if there is one; return False if it is beyond this rung."""
        if not self.ranks.on_first(self.stored_run.state.exists):
            return True
        try:
            state = load_training(self.stored_run.state)
            stood = checked(ProxyState, state, self.stored_run.state)
            if stood.step > self.config.steps:
                return False
            self.trainer.continue_from(self.stored_run.state, state)
        except ArchdslError:  # it is damaged, for example after a power failure: train again
            self.ranks.on_first(lambda: remove_folder(self.stored_run.state))
            return True
        saved = stood.progress
        self.progress.curve = Curve(**saved.curve.model_dump())
        self.progress.held_out = list(saved.held_out)
        self.progress.step_seconds = saved.step_seconds
        if not self.stored_run.is_scored(stood.step):
            self.progress.seconds = saved.seconds
            self.progress.train_flops = saved.train_flops
        return True

    def score(self) -> ProxyScore:
        """Train and evaluate the proxy, write the score into the result store, and return it.

        If the training diverges, the loss of the score is None.
        """
        try:
            self.stepped = time.perf_counter()
            self.trainer.run(on_step=self._after_step)
            self._save()
            score = self._scored(held_out(self.trainer, self.heartbeat, self.tokens))
        except TrainingDiverged:
            score = ProxyScore(loss=None, accuracy=None, bits_per_byte=None, **self._spent())
        file = self.stored_run.score(self.config.steps, self.tokens)
        self.ranks.on_first(lambda: write_text(file, score.model_dump_json()))
        return score

    def _after_step(self, step: TrainStep) -> None:
        self.heartbeat()
        self.progress.step_seconds += time.perf_counter() - self.stepped
        self.progress.curve.add(step.step, step.loss)
        self.progress.train_flops += self.step_flops
        if self.held_out_every and step.step % self.held_out_every == 0:
            found = self.trainer.evaluate((self.config.eval_tokens or 0) // CURVE_SHARE)
            self.progress.held_out.append((step.step, (found.causal or found).loss))
        due = time.perf_counter() - self.saved > SECONDS_APART
        if self.ranks.any(due and self.ranks.first):
            self._save()
        self.stepped = time.perf_counter()

    def _save(self) -> None:
        """Save the state, unless the stored state has more steps."""
        if not self.furthest:
            return
        spent = replace(self.progress, seconds=self._seconds())
        model = gathered(self.trainer.model, self.ranks)
        state = {
            name: whole(value).cpu() if isinstance(value, Tensor) else value
            for name, value in self.trainer.state().items()
        }
        self.ranks.on_first(
            lambda: save_checkpoint(
                self.stored_run.state,
                model,
                tokenizer_from=None,
                provenance={"step": self.trainer.step},
                training=state | {"progress": asdict(spent)},
                durable=False,  # without the state, the proxy can be trained again
            )
        )
        self.saved = time.perf_counter()

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    def _spent(self) -> dict[str, Any]:
        """Return the fields of a score that are known even if the training diverged."""
        return {
            "steps": self.config.steps,
            "seconds": self._seconds(),
            "train_flops": self.progress.train_flops,
            "step_seconds": self.progress.step_seconds,
            "curve": self.progress.curve.up_to(self.trainer.step),
            "held_out": tuple(self.progress.held_out),
            "peak_bytes": max(self.ranks.gather(_peak_bytes())),
            "accumulate": self.config.accumulate,
        }

    def _scored(self, found: HeldOutScores) -> ProxyScore:
        as_trained, meter = found.evaluation, found.meter
        honest = as_trained.causal or as_trained
        return ProxyScore(
            loss=honest.loss,
            accuracy=honest.accuracy,
            bits_per_byte=honest.bits_per_byte,
            leak=honest.loss - as_trained.loss,
            eval_flops=meter.flops * (2 if as_trained.causal else 1),
            flops_per_token=meter.flops_per_token,
            shares=meter.shares,
            entropies=found.health.entropies,
            **self._spent(),
        )


def _step_flops(trainer: Trainer) -> float:
    """Return the expected FLOPs of one training step.

    The length is read from a batch, because sequences of a skill may be shorter than the context.
    """
    config, spec = trainer.config, trainer.model.spec
    sequence_BT = trainer.data.batch(0, 1, trainer.context, config.seed).tokens_BT
    return config.batch_size * train_flops(spec, tokens=sequence_BT.size(1))


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
