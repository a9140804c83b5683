"""Imported by the server from which workers are forked, before the first of them is forked.

It runs what a job runs at first, because torch imports many of its modules only when a model or an
optimizer is first made or used: about five seconds of CPU that otherwise each worker would need.
Importing this module has effects. It must not leave a thread behind, as threads do not survive a
fork; so it computes no gradients, because autograd starts threads. Nor may it start CUDA, which a
forked process cannot use then; so torch is told to ask NVML whether there are GPUs.
"""

from __future__ import annotations

import gc
import os

import torch

from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.search.trials.proxy import Proxy, default_tasks
from archdsl.training.trainer import Trainer


def _run_like_a_job() -> None:
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


os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
torch.set_num_threads(1)
_run_like_a_job()
gc.freeze()  # otherwise each garbage collection of a worker would copy the memory it shares
