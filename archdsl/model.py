"""The language model: embedding, blocks, norm, head.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archdsl.block import Context, Primitive, normal_
from archdsl.blocks.attention import Attention
from archdsl.blocks.loop import Loop
from archdsl.blocks.norm import make_norm
from archdsl.blocks.router import TopK
from archdsl.spec import ModelSpec


class LanguageModel(Primitive):
    """Tokens to the logits of their successors.

    ``checkpoint_activations``: recompute each block in the backward pass instead of storing it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = make_norm(spec.norm, spec.dim, spec.norm_eps)
        self.head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self._shares: dict[str, Tensor] = {}
        self._tie()
        self._name_loops()

    if TYPE_CHECKING:

        def __call__(self, tokens_BT: Tensor) -> Tensor: ...

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V]; raises ValueError past the context the spec was made for."""
        T = tokens_BT.size(1)
        if self.spec.context < T:
            raise ValueError(f"{T} tokens exceed the context of {self.spec.context}")
        ctx = Context()
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x_BTD = checkpoint(block, x_BTD, ctx, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, ctx)
        self._shares = ctx.shares
        return self.head(self.norm(x_BTD))

    @property
    def leaks(self) -> bool:
        """Whether a router looks at later tokens."""
        return any(not router.causal for router in self._leaking())

    @contextmanager
    def causal_routing(self) -> Iterator[None]:
        """Meanwhile leaking routers select causally, by the same scores."""
        routers = self._leaking()
        before = [router.causal for router in routers]
        for router in routers:
            router.causal = True
        try:
            yield
        finally:
            for router, causal in zip(routers, before, strict=True):
                router.causal = causal

    def router_shares(self) -> dict[str, float]:
        """Share of tokens that each routed step selected in the last pass, by loop and step."""
        return {name: share.item() for name, share in self._shares.items()}

    def initialise(self, seed: int) -> None:
        """Draw all parameters.

        The n-th primitive of a class gets the same values in every model in which its shapes are
        the same, so that models that are compared start equal where they are equal.
        """
        met: Counter[str] = Counter()
        depth = max(1, sum(isinstance(module, Attention) for module in self.modules()))
        for module in self.modules():
            if isinstance(module, Primitive):
                kind = type(module).__name__
                digest = sha256(f"{seed}/{kind}/{met[kind]}".encode()).digest()
                met[kind] += 1
                rng = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
                module.reset(rng, depth)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        scale = self.spec.dim**-0.5
        self.norm.reset_parameters()
        normal_(self.head.weight, scale, rng)
        if not self.spec.tie_embeddings:
            normal_(self.embedding.weight, 1.0, rng)

    def _tie(self) -> None:
        if self.spec.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _name_loops(self) -> None:
        routers = 0
        for name, module in self.named_modules():
            if isinstance(module, Loop):
                module.label = name
                if module.router is not None:
                    module.router.salt = routers
                    routers += 1

    def _leaking(self) -> list[TopK]:
        return [module for module in self.modules() if isinstance(module, TopK)]
