"""The objective of several tasks."""

from __future__ import annotations

import pytest

from archdsl.search.trials.proxy import Proxy, ProxyScore, Task, objective

TASK = Task(data="skill:p-hop,hops=1,length=12", context=12, rungs=(2, 4))
PROXY = Proxy(tasks={"a": TASK, "b": TASK.model_copy(update={"weight": 0.5})})


def score(loss: float | None) -> ProxyScore:
    return ProxyScore(steps=4, loss=loss, accuracy=None, bits_per_byte=None, seconds=1.0)


def test_the_objective_is_the_weighted_sum_of_the_losses() -> None:
    assert objective({"a": score(2.0), "b": score(3.0)}, PROXY) == pytest.approx(3.5)


@pytest.mark.parametrize("diverged", ["a", "b"])
def test_there_is_no_objective_if_a_task_diverged(diverged: str) -> None:
    scores = {"a": score(2.0), "b": score(3.0)} | {diverged: score(None)}
    assert objective(scores, PROXY) is None
