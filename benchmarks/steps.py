"""Training steps to time: those of archdsl's trainer, and a plain training loop for peers.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from archdsl.data.types import Batch
from archdsl.lang.spec import ModelSpec
from archdsl.training.trainer import Trainer
from benchmarks.measure import precision
from benchmarks.memory import training
from benchmarks.peers import Peer

LR = 1e-4
Step = Callable[[], float]  # does one update and returns the loss before it


def trainer(spec: ModelSpec, batch: Batch, device: str = "cpu", **config: Any) -> Trainer:
    """Returns a trainer for `own_step`. ``config``: other fields of TrainConfig."""
    rows, tokens = batch.tokens_BT.shape
    fixed = {"lr": LR, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0, "clip": None}
    made = training(spec, rows, device, context=tokens, **fixed, **config)
    made.model.train()
    return made


def own_step(trained: Trainer, batch: Batch) -> Step:
    """Returns a training step of archdsl on ``batch``."""

    def step() -> float:
        loss = trained.backward(batch)
        trained.optimizer.step()
        return loss

    return step


def peer_step(peer: Peer, batch: Batch, device: str, *, compiled: bool = False) -> Step:
    """Returns a training step of another library on ``batch``, with fused AdamW.

    ``compiled``: model and loss as one function.
    """
    model = peer.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    tokens_BT, targets_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
    half = precision(device) == torch.bfloat16
    loss_of = torch.compile(peer.loss, dynamic=False) if compiled else peer.loss

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
