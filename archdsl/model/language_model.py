"""The language model: embedding, blocks, norm, head.

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
    """Tokens to the logits of their successors.

    ``layers``: the blocks, those of a stack one by one. ``checkpoint_activations``: recompute each
    of them in the backward pass instead of storing it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = make_norm(spec.norm, spec.dim, spec.norm_eps)
        self.head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.trace = Trace()  # of the last pass
        self._tie()
        # lists, as every token that is decoded asks for them
        self.layers = [layer for block in self.blocks for layer in cast(Block, block).unrolled()]
        self.loops = [module for module in self.modules() if isinstance(module, Loop)]
        self.routers = [loop.router for loop in self.loops if loop.router is not None]
        self._name_loops()

    if TYPE_CHECKING:

        def __call__(
            self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
        ) -> Tensor: ...

    def forward(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits [B, T, V].

        ``mask_BT``: False where a token only pads its row, on whatever side; no other token's
        logits depend on it. ``cache``: the tokens go on from those that it holds, and join them;
        routers that leak then choose causally. Raises ContextFullError past the context.
        """
        return self.head(self.norm(self.hidden(self.embedding(tokens_BT), mask_BT, cache)))

    def next_logits(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Those of `forward` after the last token of each row alone, [B, V]."""
        x_BTD = self.hidden(self.embedding(tokens_BT), mask_BT, cache)
        return self.head(self.norm(x_BTD[:, -1]))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Nats of all targets together, at least in float32; IGNORE asks nothing.

        What `forward` and cross-entropy come to, but only some rows of logits exist at a time.
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
        """The stream after the blocks, before the norm; ``each`` collects it after each layer."""
        if self.training:
            self.commit()
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
        stream = cache.stream(T, length_B)
        pos_BT = None if stream.begins else stream.order(x_BTD)
        return Context(stream, pos_BT, cache=cache, trace=trace)

    def for_decoding(self) -> Self:
        """This model, no longer to be trained, as it decodes fastest on a CPU.

        Matrices are laid out column by column: a token's product with one is bound by memory, and
        takes .6 to .8 of the time so (MKL). Optimizers would take the layout for the old one.
        """
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
                module.weight.data = module.weight.t().contiguous().t()
        return self

    def check_dial(self, cache: Cache) -> None:
        """Raises DialError unless all tokens of a cache come at the same setting."""
        settings = [loop.passes for loop in self.loops]
        if cache.settings not in (None, settings):
            raise DialError("the dial was turned while a cache was in use; begin with a new one")
        cache.settings = settings

    def new_cache(self, max_length: int | None = None) -> Cache:
        """An empty cache for ``max_length`` tokens (default: the context) of each row."""
        context = self.spec.context
        if max_length is not None and max_length > context:
            raise ContextFullError(f"{max_length:,} tokens exceed the context of {context:,}")
        return Cache(max_length or context)

    def dial(
        self,
        capacity: Sequence[float] | float | None = None,
        steps: int | None = None,
    ) -> None:
        """Another capacity of all routed steps, or one for each; another number of steps.

        0 skips a step, 1 takes every token; steps beyond the trained ones use what the last of
        them learned. Without arguments: as trained. Raises DialError, with all as it was, where
        a loop cannot be run so.
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
        """Whether a router looks at later tokens."""
        return any(router.leaks for router in self.routers)

    @contextmanager
    def causal_routing(self) -> Iterator[None]:
        """Meanwhile leaking routers select causally, as they do when they decode."""
        with selecting_causally(self.routers):
            yield

    def router_shares(self) -> dict[str, float]:
        """Share of tokens that each routed step selected in the last pass, by loop and step."""
        shares = self.trace.shares
        there = {name: share for name, share in shares.items() if isinstance(share, Tensor)}
        told = torch.stack(list(there.values())).tolist() if there else []  # one question for all
        known = shares | dict(zip(there, told, strict=True))
        return {name: float(share) for name, share in known.items()}

    def predictor_accuracies(self) -> dict[str, float]:
        """How often predictors were right about the choice, by loop and step."""
        return {name: share.item() for name, share in self.trace.accuracies.items()}

    def commit(self) -> None:
        """Takes up what the last training pass taught the routers besides gradients; the next
        training pass begins with it, too."""
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
        scale = self.spec.dim**-0.5
        self.norm.reset_parameters()
        normal_(self.head.weight, scale, rng)
        if not self.spec.tie_embeddings:
            normal_(self.embedding.weight, 1.0, rng)

    def _tie(self) -> None:
        if self.spec.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _name_loops(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Loop):
                module.label = name
                module.dial()
        for salt, router in enumerate(self.routers):
            router.salt = salt


def summed_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Of the logits ``x_ND @ weight_VD.T``, in nats, a part of the rows after the other."""
    device, V = x_ND.device.type, len(weight_VD)
    if torch.is_autocast_enabled(device):  # which does not look into the function
        x_ND, weight_VD = (x.to(torch.get_autocast_dtype(device)) for x in (x_ND, weight_VD))
    exact = x_ND.dtype in (torch.float32, torch.float64)
    with torch.autocast(device, enabled=False):
        nats = F.linear_cross_entropy(
            x_ND,
            weight_VD,
            target_N,
            # sum makes the gradients at once, but adds up in the precision of x_ND: in bfloat16
            # the loss would be off by percents
            reduction="sum" if exact else "none",
            ignore_index=IGNORE,
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=max(1, LOGITS.get(device, 2**22) // V), chunking_method=None
            ),
        )
    return nats.to(torch.promote_types(nats.dtype, torch.float32)).sum()


def _real_first(mask_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Indices that put padding last in each row, and how many tokens are real; None: all are."""
    if mask_BT is None:
        return None, None
    mask_BT = mask_BT.bool()
    if mask_BT.size(1) == 1:
        return None, mask_BT.sum(1)
    return (~mask_BT).to(torch.int8).sort(dim=1, stable=True).indices, mask_BT.sum(1)


def _as_before(x_BTD: Tensor, index_BT: Tensor | None) -> Tensor:
    return x_BTD if index_BT is None else take(x_BTD, index_BT.argsort(1))
