"""Score one setting of a supernet. The first job that needs the supernet trains it for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from archdsl import __version__
from archdsl.costs.receipt import sequence_cost
from archdsl.files import write_text
from archdsl.lang.plugin_sources import plugin_digests
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.model.parts import running_loops
from archdsl.nn.loop import Pass
from archdsl.search.supernet.supernet import (
    RANDOM_SETTINGS,
    SandwichTrainer,
    Supernet,
    build_net,
    calibrate_routers,
    dial,
    setting_of,
    with_setting,
)
from archdsl.search.trials.proxy import Job
from archdsl.search.trials.proxy_scoring import held_out
from archdsl.search.trials.proxy_training import ProxyScore, ProxyTraining, read_score
from archdsl.search.trials.result_store import StoredRun
from archdsl.training.trainer import TrainStep


@dataclass(frozen=True)
class SupernetJob(Job):
    """Score ``spec`` with the weights of the supernet ``net``; both have the size of a proxy.

    ``steps``: the training steps of the supernet. The time and FLOPs of its training are included
    only in the score that is returned by the call that trained it.
    """

    net: Supernet = field(kw_only=True)

    @property
    def stored_run(self) -> StoredRun:
        """Where the trained supernet is stored."""
        data = self.task.load()
        identity = {
            "archdsl": __version__,
            "model": self.net.spec.model_dump(
                mode="json", exclude={"name", "description", "budget"}
            ),
            "settings": self.net.settings,
            "drawn": RANDOM_SETTINGS,
            "data": data.fingerprint,
            "training": self.config.model_dump(mode="json", exclude={"accumulate"}),
            **plugin_digests(self.net.spec),
        }
        return StoredRun(
            self.store, identity, description={"name": self.net.spec.name, "data_name": data.name}
        )

    def file(self, stored_run: StoredRun) -> Path:
        """Return the path of the file with the score of this job's setting."""
        text = json.dumps(setting_of(self.spec))
        return stored_run.folder / f"setting-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        """Return the score of the setting; train the supernet first if it is not yet trained.

        Waits while another process trains the supernet, and calls ``heartbeat`` regularly. If the
        training diverged, the loss of the returned score is None. Raises TrainingDiverged if the
        loss of the setting is not finite.
        """
        stored_run = self.stored_run
        file = self.file(stored_run)
        if stored := read_score(file):
            return stored
        with stored_run.locked(heartbeat):
            if stored := read_score(file):  # the process that held the lock before has written it
                return stored
            model = build_net(self.net, self.seed)
            trainer = SandwichTrainer(self.net, model, self.task.load(), self.config)
            training = SupernetTraining(stored_run, trainer, heartbeat)
            trained = read_score(stored_run.score(self.steps)) or training.score()
        if trained.loss is None:
            return trained
        score = training.score_setting(self.spec)
        write_text(file, score.model_dump_json())
        return score


class SupernetTraining(ProxyTraining):
    """The training of a supernet. Its own score is the score of its largest setting.

    The time and FLOPs of the training are included in every score that this object returns.
    """

    trainer: SandwichTrainer

    def __init__(
        self, stored_run: StoredRun, trainer: SandwichTrainer, heartbeat: Callable[[], None]
    ) -> None:
        super().__init__(stored_run, trainer, heartbeat)
        self.net = trainer.net
        sequence_BT = trainer.data.batch(0, 1, trainer.context, self.config.seed).tokens_BT
        self.flops = {
            one: sequence_cost(with_setting(self.net.spec, one), tokens=sequence_BT.size(1)).flops
            for one in self.net.settings
        }

    def _after_step(self, step: TrainStep) -> None:
        ran = self.net.sandwich(step.step - 1, self.config.seed)
        self.step_flops = 3 * self.config.batch_size * sum(self.flops[one] for one in ran)
        super()._after_step(step)

    def score_setting(self, spec: ModelSpec) -> ProxyScore:
        """Return the score of a spec that the supernet serves.

        Raises TrainingDiverged if the loss is not finite.
        """
        model = self.trainer.model
        dial(model, setting_of(spec))
        calibrate_routers(self.trainer)
        score = self._scored(held_out(self.trainer, self.heartbeat))
        names = routed_names(model, spec)
        measured = {
            name: {new: found[old] for new, old in names.items() if old in found}
            for name, found in {"shares": score.shares, "entropies": score.entropies}.items()
        }
        return score.model_copy(update=measured)


def routed_names(model: LanguageModel, spec: ModelSpec) -> dict[str, str]:
    """Map the name of each routed step of the canonical ``spec`` to its name in the supernet.

    ``model``: the supernet, at the setting of ``spec``. A step that takes every token has a router
    in the supernet but none in the spec, so it is left out. Raises ValueError if the two models
    have different numbers of loops with a router.
    """
    ran = [loop for loop in running_loops(model) if any(map(_chooses, loop.passes))]
    loops = meta_model(spec.canonical()).loops
    meant = [loop for loop in loops if any(map(_chooses, loop.passes))]
    names: dict[str, str] = {}
    for big, small in zip(ran, meant, strict=True):
        for one in filter(_chooses, small.passes):
            there = big.passes[one.step].routed
            assert one.routed is not None
            assert there is not None
            names[one.routed.name] = there.name
    return names


def _chooses(one: Pass) -> bool:
    """Whether some tokens may not take a pass: by the choice of a router or an exit."""
    return one.routed is not None and (one.routed.capacity < 1 or one.exit is not None)
