"""Training steps to be timed: of models by their trainer, of peers by a loop as one writes it.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from archdsl.batch import Batch, HeldOut, Split
from archdsl.build import build
from archdsl.schedule import TrainConfig
from archdsl.spec import ModelSpec
from archdsl.trainer import Trainer
from benchmarks.measure import precision
from benchmarks.peers import Peer

LR = 1e-4
Step = Callable[[], float]  # the loss before its update


@dataclass(frozen=True)
class OneBatch:
    """Data that is the same at every step."""

    only: Batch
    vocab_size: int
    name: str = "one batch"
    fingerprint: str = "one batch"
    chance: float | None = None

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        return self.only

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        yield self.only

    def bytes_per_token(self, split: Split) -> float | None:
        return None

    def save_tokenizer(self, path: object) -> None:
        """There is none."""


def trainer(
    spec: ModelSpec,
    batch: Batch,
    device: str = "cpu",
    *,
    compiled: bool = False,
    checkpointed: bool = False,
) -> Trainer:
    rows, tokens = batch.tokens_BT.shape
    config = TrainConfig(
        steps=10**6,
        batch_size=rows,
        context=tokens,
        lr=LR,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0,
        clip=None,
        device=device,
        compile=compiled,
        activation_checkpointing=checkpointed,
    )
    made = Trainer(build(spec, seed=0), OneBatch(batch, spec.vocab_size), config)
    made.model.train()
    return made


def own_step(trainer: Trainer, batch: Batch) -> Step:
    def step() -> float:
        loss = trainer.backward(batch)
        trainer.optimizer.step()
        return loss

    return step


def peer_step(peer: Peer, batch: Batch, device: str, *, compiled: bool = False) -> Step:
    model = peer.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    tokens_BT, targets_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
    half = precision(device) == torch.bfloat16
    if compiled:
        model.compile(dynamic=False)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = peer.loss(tokens_BT, targets_BT)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
