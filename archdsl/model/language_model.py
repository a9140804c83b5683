"""The language model: embedding, blocks, a last norm and the head.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from archdsl.lang.spec import ModelSpec
from archdsl.model.backbone import Backbone, final_norm
from archdsl.model.loss import summed_cross_entropy
from archdsl.model.parts import seed_names
from archdsl.nn.block import Block, Primitive, join_, normal_, stream_depth
from archdsl.nn.cache import Cache
from archdsl.nn.loop import DialError

__all__ = ["DialError", "LanguageModel"]

Weight = float | Tensor


class LanguageModel(Backbone, Primitive):
    """Maps tokens to the logits of the next tokens.

    See `Backbone` for its blocks and what can be done with them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = final_norm(spec)
        self.head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self._tie()
        self.find_parts()
        if rule := spec.training:
            for router in self.routers:
                router.z_loss, router.aux_loss = rule.router_z_loss, rule.router_aux_loss

    if TYPE_CHECKING:

        def __call__(  # noqa: D102  for type checkers alone
            self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
        ) -> Tensor: ...

    def forward(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The logits [B, T, V] of the tokens that follow ``tokens_BT``.

        ``mask_BT``: False where a token is padding, on either side of a row; the logits of other
        tokens do not depend on padding. ``cache``: the tokens continue those that it holds, and are
        added to it; routers that see later tokens then select causally. Raises ContextFullError if
        there are more tokens than the context; DialError if the dial was turned since the first
        token of the cache.
        """
        return self.readout(self.hidden(self.embedding(tokens_BT), mask_BT, cache))

    def next_logits(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The logits [B, V] after the last token of each row; see `forward`."""
        x_BTD = self.hidden(self.embedding(tokens_BT), mask_BT, cache)
        return self.readout(x_BTD[:, -1])

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross-entropy of ``targets_BT`` in nats, at least in float32.

        Targets that are IGNORE do not count. In training, where the spec asks for losses after
        several passes of the last block, it is their weighted sum. Else it is the cross-entropy of
        the logits of `forward`. Only some rows of logits are in memory at a time.
        """
        x_BTD, target_N = self.hidden(self.embedding(tokens_BT)), targets_BT.flatten()
        if self.trace.passes:
            return self._weighted(self.trace.passes, targets_BT)
        return summed_cross_entropy([self.norm(x_BTD).flatten(0, 1)], self.head.weight, target_N)

    def loss_of_passes(
        self, tokens_BT: Tensor, targets_BT: Tensor, weigh: Callable[[int], Sequence[Weight]]
    ) -> Tensor:
        """As `loss`, of the predictions after every pass of the last layer, which is a loop.

        ``weigh``: given the number of passes, the weight of each in the sum: a number, or one for
        each token, [B, T]. Each pass goes through the last norm and the head.
        """
        passes: list[Tensor] = []
        self.hidden(self.embedding(tokens_BT), passes=passes)
        return self._weighted(zip(passes, weigh(len(passes)), strict=True), targets_BT)

    def _weighted(self, passes: Iterable[tuple[Tensor, Weight]], targets_BT: Tensor) -> Tensor:
        streams, weights = zip(*passes, strict=True)
        normed = [self.norm(x_BTD).flatten(0, 1) for x_BTD in streams]
        alike = [torch.as_tensor(w, device=x.device) for w, x in zip(weights, normed, strict=True)]
        weight_PN = torch.stack([w.expand_as(targets_BT).flatten() for w in alike])
        return summed_cross_entropy(normed, self.head.weight, targets_BT.flatten(), weight_PN)

    def for_decoding(self) -> Self:
        """This model, prepared to decode fast. It must not be trained afterwards.

        On a CPU, matrices are stored column by column: the product of one token with a matrix is
        bound by memory, and takes 0.6 to 0.8 times as long then (MKL). Optimizers would read the
        stored numbers in the wrong order. On other devices, matrices with the same input are stored
        as one, because one product takes less time than several.
        """
        self.eval().requires_grad_(False)
        if self.embedding.weight.device.type != "cpu":
            self._side_by_side()
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
                module.weight.data = module.weight.t().contiguous().t()
        return self

    def _side_by_side(self) -> None:
        for block in self.modules():
            for matrices in block.side_by_side() if isinstance(block, Block) else ():
                if all(type(one) is nn.Linear for one in matrices):
                    join_(matrices)

    def readout(self, x_BTD: Tensor) -> Tensor:
        """The logits [B, T, V] of a stream."""
        return self.head(self.norm(x_BTD))

    def initialise(self, seed: int) -> None:
        """Draws the initial values of all parameters.

        The n-th part of a kind gets the same values in every model in which its shapes are the
        same, so that models that are compared start equal where they are equal.
        """
        met: Counter[str] = Counter()
        depth = stream_depth(self)
        for name, module in seed_names(self):
            digest = sha256(f"{seed}/{name}/{met[name]}".encode()).digest()
            met[name] += 1
            module.reset(torch.Generator().manual_seed(int.from_bytes(digest[:7])), depth)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the embedding and the head, and sets the norm to 1."""
        scale = self.spec.dim**-0.5
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()
        normal_(self.head.weight, scale, rng)
        if not self.spec.tie_embeddings:
            normal_(self.embedding.weight, 1.0, rng)

    def _tie(self) -> None:
        if self.spec.tie_embeddings:
            self.head.weight = self.embedding.weight
