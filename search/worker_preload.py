"""What the server of `pool` does before children are forked from it: all that is slow at first.

Importing this has effects. No thread may be left behind, as threads do not survive a fork; so
nothing is trained here: autograd starts threads.
"""

from __future__ import annotations

import gc
from itertools import chain

import numpy.ctypeslib  # noqa: F401  numpy itself imports it when it is first asked for
import tokenizers  # noqa: F401  every text is read with one
import torch

from archdsl.lang.load import load
from archdsl.lang.registry import families
from archdsl.model.build import build
from archdsl.search.trials.proxy import Proxy, default_tasks
from archdsl.training.trainer import Trainer


def _begin_like_a_job() -> None:
    """Much of torch is imported when a model or an optimizer is first made, or first used."""
    task = default_tasks()["skill"]
    proxy = Proxy(dim=16, head_size=8, tasks={"skill": task})
    model = build(proxy.shrink(load("tiny"), task))
    trainer = Trainer(model, task.load(), task.config(seed=0))
    trainer.evaluate()
    batch = task.load().batch(0, 1, task.context, 0)
    trainer.model.loss(batch.tokens_BT, batch.targets_BT)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()


torch.set_num_threads(1)
for part in chain.from_iterable(kinds.values() for kinds in families().values()):
    part.model_rebuild()  # or each child would, of the kinds that it meets first
_begin_like_a_job()
gc.freeze()  # or a collection in a child would touch, and so copy, the memory it shares
