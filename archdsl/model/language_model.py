"""The language model: embedding, blocks, a last norm and the head.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archdsl.costs.activations import LOGITS
from archdsl.data.types import IGNORE
from archdsl.lang.spec import ModelSpec
from archdsl.model.parts import seed_names
from archdsl.nn.block import Block, Context, Primitive, Trace, normal_, stream_depth
from archdsl.nn.cache import Cache, ContextFullError, Stream
from archdsl.nn.gather import take
from archdsl.nn.loop import DialError, Loop, selecting_causally
from archdsl.nn.norm import make_norm

__all__ = ["DialError", "LanguageModel"]


class LanguageModel(Primitive):
    """Maps tokens to the logits of the next tokens.

    ``layers``: the blocks in their order, those of a stack one by one. ``loops`` and ``routers``:
    all loops and all routers, in their order. ``checkpoint_activations``: whether the backward pass
    recomputes each layer instead of storing its activations. ``trace``: of the last pass.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = make_norm(spec.norm, spec.dim, spec.norm_eps)
        self.head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.trace = Trace()
        self._tie()
        # lists, because every decoded token needs them
        self.layers = [layer for block in self.blocks for layer in cast(Block, block).unrolled()]
        self.loops = [module for module in self.modules() if isinstance(module, Loop)]
        self.routers = [loop.router for loop in self.loops if loop.router is not None]
        self._name_parts()

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
        return self.head(self.norm(self.hidden(self.embedding(tokens_BT), mask_BT, cache)))

    def next_logits(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The logits [B, V] after the last token of each row; see `forward`."""
        x_BTD = self.hidden(self.embedding(tokens_BT), mask_BT, cache)
        return self.head(self.norm(x_BTD[:, -1]))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross-entropy of ``targets_BT`` in nats, at least in float32.

        Targets that are IGNORE do not count. Equal to the cross-entropy of the logits of `forward`,
        but only some rows of logits are in memory at a time.
        """
        x_ND = self.norm(self.hidden(self.embedding(tokens_BT))).flatten(0, 1)
        return summed_cross_entropy(x_ND, self.head.weight, targets_BT.flatten())

    def hidden(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None = None,
        cache: Cache | None = None,
        each: list[Tensor] | None = None,
    ) -> Tensor:
        """The stream [B, T, D] after the blocks and before the last norm.

        ``x_BTD``: the embedded tokens. ``each``: a list to which the stream after each layer is
        added. See `forward` for ``mask_BT``, ``cache`` and the errors.
        """
        if self.training:
            for router in self.routers:
                router.begin_pass()
        index_BT, length_B = _real_first(mask_BT)
        if index_BT is not None:
            x_BTD = take(x_BTD, index_BT)
        ctx = self._context(x_BTD, length_B, cache)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x_BTD = checkpoint(layer, x_BTD, ctx, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, ctx)
            if each is not None:
                each.append(_as_before(x_BTD, index_BT))
        if cache is not None:
            cache.move(ctx.stream.after(x_BTD.size(1)))
        self.trace = ctx.trace
        if self.trace.steps_BT is not None and index_BT is not None:
            self.trace.steps_BT = self.trace.steps_BT.gather(1, index_BT.argsort(1))
        return _as_before(x_BTD, index_BT)

    def _context(self, x_BTD: Tensor, length_B: Tensor | None, cache: Cache | None) -> Context:
        B, T, _ = x_BTD.shape
        trace = Trace()
        if not torch.is_grad_enabled():
            trace.steps_BT = torch.zeros(B, T, dtype=torch.long, device=x_BTD.device)
        if cache is None:
            if self.spec.context < T:
                raise ContextFullError(f"{T:,} tokens exceed the context of {self.spec.context:,}")
            return Context(Stream(length_B=length_B), trace=trace)
        self.check_dial(cache)
        cache.check_rows(B)
        stream = cache.stream(T, length_B)
        pos_BT = None if stream.begins else stream.order(x_BTD)
        return Context(stream, pos_BT, cache=cache, trace=trace)

    def for_decoding(self) -> Self:
        """This model, prepared to decode fast on a CPU. It must not be trained afterwards.

        Matrices are stored column by column: the product of one token with a matrix is bound by
        memory, and takes 0.6 to 0.8 times as long then (MKL). Optimizers would read the stored
        numbers in the wrong order.
        """
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
                module.weight.data = module.weight.t().contiguous().t()
        return self

    def check_dial(self, cache: Cache) -> None:
        """Raises DialError unless all tokens of a cache were computed at the same dial setting."""
        settings = [loop.passes for loop in self.loops]
        if cache.settings not in (None, settings):
            raise DialError("the dial was turned while a cache was in use; begin with a new one")
        cache.settings = settings

    def new_cache(self, max_length: int | None = None) -> Cache:
        """An empty cache for ``max_length`` tokens of each row; default: the context.

        Raises ContextFullError if that is more than the context.
        """
        context = self.spec.context
        if max_length is not None and max_length > context:
            raise ContextFullError(f"{max_length:,} tokens exceed the context of {context:,}")
        return Cache(max_length or context)

    def dial(
        self,
        capacity: Sequence[float] | float | None = None,
        steps: int | None = None,
    ) -> None:
        """Turns the compute dial: the capacities and the number of steps of all loops.

        ``capacity``: one for all routed steps, or one for each; 0 skips a step, 1 takes all tokens.
        ``steps``: steps beyond the trained ones use the weights of the last one. None: as trained.
        Raises DialError, and changes nothing, if a loop cannot be run so.
        """
        if not self.loops and not (capacity is None and steps is None):
            raise DialError(f"{self.spec.name} has no loops: there is nothing to dial")
        if capacity is not None and not self.routers:
            raise DialError(f"{self.spec.name} has no routers, so there is no capacity to dial")
        before = [loop.passes for loop in self.loops]
        try:
            for loop in self.loops:
                loop.dial(capacity, steps)
        except DialError:
            for loop, passes in zip(self.loops, before, strict=True):
                loop.passes = passes
            raise
        self.trace = Trace()

    @property
    def leaks(self) -> bool:
        """Whether a router looks at later tokens when the model is used."""
        return any(router.leaks for router in self.routers)

    @contextmanager
    def causal_routing(self) -> Iterator[None]:
        """Within the block, routers that see later tokens select causally, as in decoding."""
        with selecting_causally(self.routers):
            yield

    def router_shares(self) -> dict[str, float]:
        """The share of tokens that each routed step selected in the last pass, by loop and step."""
        shares = self.trace.shares
        there = {name: share for name, share in shares.items() if isinstance(share, Tensor)}
        told = torch.stack(list(there.values())).tolist() if there else []  # one transfer for all
        known = shares | dict(zip(there, told, strict=True))
        return {name: float(share) for name, share in known.items()}

    def predictor_accuracies(self) -> dict[str, float]:
        """The share of correct predictions of predictor routers, by loop and step."""
        return {name: share.item() for name, share in self.trace.accuracies.items()}

    def commit(self) -> None:
        """Adds to the statistics of the routers what the last batch showed.

        The first training pass after the weights changed does that for the batch before: passes
        with equal weights are parts of one batch, and what they show counts once.
        """
        for router in self.routers:
            router.commit()

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
        self.norm.reset_parameters()
        normal_(self.head.weight, scale, rng)
        if not self.spec.tie_embeddings:
            normal_(self.embedding.weight, 1.0, rng)

    def _tie(self) -> None:
        if self.spec.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _name_parts(self) -> None:
        for number, (name, module) in enumerate(self.named_modules()):
            if isinstance(module, Primitive):
                module.number = number
            if isinstance(module, Loop):
                module.label = name
                module.dial()
        for salt, router in enumerate(self.routers):
            router.salt = salt


def summed_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The summed cross-entropy, in nats, of the logits ``x_ND @ weight_VD.T``.

    ``target_N``: the target tokens; IGNORE does not count. Only some logits exist at a time.
    """
    device, V = x_ND.device.type, len(weight_VD)
    if torch.is_autocast_enabled(device):  # autocast does not reach into the function
        x_ND, weight_VD = (x.to(torch.get_autocast_dtype(device)) for x in (x_ND, weight_VD))
    exact = x_ND.dtype in (torch.float32, torch.float64)
    with torch.autocast(device, enabled=False):
        nats = F.linear_cross_entropy(
            x_ND,
            weight_VD,
            target_N,
            # "sum" computes the gradients at once, but adds up in the precision of x_ND: in
            # bfloat16 the loss would be wrong by some percent
            reduction="sum" if exact else "none",
            ignore_index=IGNORE,
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=max(1, LOGITS.get(device, 2**22) // V), chunking_method=None
            ),
        )
    return nats.to(torch.promote_types(nats.dtype, torch.float32)).sum()


def _real_first(mask_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Indices [B, T] that put padding last in each row, and the number of other tokens, [B].

    None stands for rows that are in order, and for rows without padding.
    """
    if mask_BT is None:
        return None, None
    mask_BT = mask_BT.bool()
    if mask_BT.size(1) == 1:
        return None, mask_BT.sum(1)
    return (~mask_BT).to(torch.int8).sort(dim=1, stable=True).indices, mask_BT.sum(1)


def _as_before(x_BTD: Tensor, index_BT: Tensor | None) -> Tensor:
    return x_BTD if index_BT is None else take(x_BTD, index_BT.argsort(1))
