"""Measures passes of a model: tokens, executed FLOPs, and the share that each step selected.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from archdsl.model.executed_flops import flops_per_token
from archdsl.model.language_model import LanguageModel
from archdsl.nn.cache import Cache


@dataclass
class RouterCounts:
    """How many tokens each routed step ``selected`` in some passes, by loop and step, and of how
    many it was ``given``, which are fewer than all where another loop selects first."""

    selected: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)

    @property
    def shares(self) -> dict[str, float]:
        """The share of its tokens that each routed step selected."""
        return {name: self.selected[name] / max(1, tokens) for name, tokens in self.given.items()}

    def note(self, model: LanguageModel) -> None:
        """Adds the last pass of the model."""
        for name, (selected, given) in model.router_counts().items():
            self.selected[name] += selected
            self.given[name] += given

    def add(self, other: RouterCounts) -> None:
        """Adds the counts of other passes."""
        self.selected.update(other.selected)
        self.given.update(other.given)


@dataclass
class Meter:
    """Sums over the passes of one model. Padding is not counted.

    ``fixed``: FLOPs per token of a model without loops, by the length of the sequence.
    """

    tokens: int = 0
    flops: float = 0.0
    routers: RouterCounts = field(default_factory=RouterCounts)
    fixed: dict[int, float] = field(default_factory=dict)

    @property
    def flops_per_token(self) -> float:
        """Executed forward FLOPs, in the mean over all tokens."""
        return self.flops / max(1, self.tokens)

    @property
    def shares(self) -> dict[str, float]:
        """See `RouterCounts`."""
        return self.routers.shares

    def note(
        self,
        model: LanguageModel,
        tokens_BT: Tensor,
        mask_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        """Adds the pass that the model has just run with these arguments.

        ``tokens_BT``, ``mask_BT`` and ``cache``: as of `LanguageModel.forward`.
        """
        count = tokens_BT.numel() if mask_BT is None else int(mask_BT.sum())
        # with a cache, tokens attend to all tokens before them
        length = tokens_BT.size(1) if cache is None else int(torch.as_tensor(cache.length).max())
        self.tokens += count
        self.flops += count * self._per_token(model, length)
        self.routers.note(model)

    def add(self, other: Meter) -> None:
        """Add what another meter has measured of the same model."""
        self.tokens += other.tokens
        self.flops += other.flops
        self.routers.add(other.routers)

    def _per_token(self, model: LanguageModel, length: int) -> float:
        if model.loops:
            return flops_per_token(model, length)
        if length not in self.fixed:  # every pass costs the same
            self.fixed[length] = flops_per_token(model, length)
        return self.fixed[length]


@contextmanager
def metered(model: LanguageModel) -> Iterator[Meter]:
    """Within the block, every pass of the model is measured."""
    meter = Meter()

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> None:
        meter.note(model, *args, **kwargs)

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield meter
    finally:
        handle.remove()
