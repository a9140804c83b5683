"""The blocks of a language model as one: what is in common with and without embedding and head.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archdsl.lang.spec import ModelSpec
from archdsl.nn.block import Block, Context, Primitive, Trace
from archdsl.nn.cache import Cache, ContextFullError, Stream
from archdsl.nn.gather import take
from archdsl.nn.loop import DialError, Loop, Router, selecting_causally
from archdsl.nn.norm import make_norm
from archdsl.nn.precision import autocast_dtype

Call = Callable[[nn.Module, Tensor, Context], Tensor]  # of a layer


class Backbone(nn.Module):
    """Maps embedded tokens to the stream after all ``blocks``. Whoever inherits from it builds
    ``spec`` and ``blocks``, and calls `find_parts` at the end.

    ``layers``: the blocks in their order, those of a stack one by one; ``layer_names``: of each.
    ``loops`` and ``routers``: all loops and all routers, in their order. ``counting``: what keeps
    statistics of training batches, see `Primitive.commit`. ``checkpoint_activations``: whether the
    backward pass recomputes each layer instead of storing its activations. ``noise_B``: int64 [B],
    what the random numbers of the rows of the next training passes are drawn by; None: the state of
    torch's generator. ``trace``: of the last pass. ``readout``: the logits of a stream; None: there
    is no head.
    """

    spec: ModelSpec
    blocks: nn.ModuleList
    layers: list[nn.Module]
    layer_names: dict[nn.Module, str]
    loops: list[Loop]
    routers: list[Router]
    counting: list[Primitive]
    trace: Trace
    checkpoint_activations: bool = False
    noise_B: Tensor | None = None
    readout: Callable[[Tensor], Tensor] | None = None

    def find_parts(self) -> None:
        """Finds the layers, loops and routers, and numbers all primitives. Called once all modules
        of the model are there."""
        self.trace = Trace()
        # lists, because every decoded token needs them
        self.layers = [layer for block in self.blocks for layer in cast(Block, block).unrolled()]
        names = {module: name for name, module in self.named_modules()}
        self.layer_names = {layer: names[layer] for layer in self.layers}
        self.loops = [module for module in self.modules() if isinstance(module, Loop)]
        self.routers = [loop.router for loop in self.loops if loop.router is not None]
        places = {
            module: f".{name}" if name else ""
            for layer in self.layers
            for name, module in layer.named_modules()
        }
        for number, (name, module) in enumerate(self.named_modules()):
            if isinstance(module, Primitive):
                module.number, module.place = number, places.get(module, name)
            if isinstance(module, Loop):
                module.label = name
                module.dial()
        primitives = [one for one in self.blocks.modules() if isinstance(one, Primitive)]
        self.counting = [one for one in primitives if type(one).commit is not Primitive.commit]
        for salt, router in enumerate(self.routers):
            router.salt = salt

    def hidden(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None = None,
        cache: Cache | None = None,
        each: list[Tensor] | None = None,
        pos_BT: Tensor | None = None,
        passes: list[Tensor] | None = None,
    ) -> Tensor:
        """The stream [B, T, D] after the blocks and before the last norm.

        ``x_BTD``: the embedded tokens. ``each``: a list to which the stream after each layer is
        added. ``passes``: a list to which the last layer, a loop, adds the stream after each of its
        passes that gets a gradient. ``pos_BT`` [1 or B, T]: the position of each token; default:
        the number of real tokens before it. See `forward` for the others and the errors.
        """
        if self.training:
            for one in self.counting:
                one.begin_pass()
        # under autocast the stream is as wide as the products: half of the bytes to move
        x_BTD = x_BTD.to(autocast_dtype(x_BTD.device) or x_BTD.dtype)
        index_BT, length_B = _real_first(mask_BT)
        if index_BT is not None:
            x_BTD = take(x_BTD, index_BT)
            pos_BT = None if pos_BT is None else pos_BT.expand_as(index_BT).gather(1, index_BT)
        ctx = self.begin(x_BTD, length_B, cache, pos_BT)
        for number, layer in enumerate(self.layers, 1):
            last = passes is not None and number == len(self.layers)
            here = replace(ctx, passes=passes) if last else ctx
            x_BTD = self.run_layer(layer, x_BTD, here)
            if each is not None:
                each.append(_as_before(x_BTD, index_BT))
        self.end(x_BTD, ctx)
        if index_BT is not None:
            self.trace.put_back(index_BT.argsort(1))
        return _as_before(x_BTD, index_BT)

    def run_layer(
        self, layer: nn.Module, x_BTD: Tensor, ctx: Context, call: Call | None = None
    ) -> Tensor:
        """The stream after one of the layers, [B, T, D]. ``call``: default: `call_layer`."""
        name = self.layer_names.get(layer, "")
        kept = None if ctx.cache is None else ctx.cache.of_layer(name)
        inner = replace(ctx, trace=ctx.trace.for_layer(), kept=kept)
        if ctx.noise_B is not None:  # a tensor, so that equal layers share a compiled graph
            inner = replace(inner, noise_B=ctx.noise_B * 0x85EBCA77 + self.layers.index(layer))
        x_BTD = (call or self.call_layer)(layer, x_BTD, inner)
        ctx.trace.take_over(inner.trace, name)
        return x_BTD

    def call_layer(self, layer: nn.Module, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Calls a layer; see ``checkpoint_activations``."""
        if self.checkpoint_activations and self.training:
            return cast(Tensor, checkpoint(layer, x_BTD, ctx, use_reentrant=False))
        return cast(Tensor, layer(x_BTD, ctx))

    def end(self, x_BTD: Tensor, ctx: Context) -> None:
        """Ends the pass over a chunk: its tokens are past, and its trace is that of the model."""
        if ctx.cache is not None:
            ctx.cache.move(ctx.stream.after(x_BTD.size(1)))
        self.trace = ctx.trace

    def begin(
        self,
        x_BTD: Tensor,
        length_B: Tensor | None,
        cache: Cache | None,
        pos_BT: Tensor | None = None,
    ) -> Context:
        """The context of a pass over embedded tokens, the real ones first in each row.

        ``length_B``: the number of real tokens; None: all are. See `hidden` for the others.
        """
        B, T, _ = x_BTD.shape
        trace = Trace()
        if not torch.is_grad_enabled():
            trace.steps_BT = torch.zeros(B, T, dtype=torch.long, device=x_BTD.device)
        readout = self.readout if any(loop.needs_readout for loop in self.loops) else None
        if cache is None:
            if self.spec.context < T:
                raise ContextFullError(f"{T:,} tokens exceed the context of {self.spec.context:,}")
            stream = Stream(length_B=length_B)
            noise_B = self.noise_B if self.training else None
            return Context(stream, pos_BT, trace=trace, readout=readout, noise_B=noise_B)
        self.check_dial(cache)
        cache.check_rows(B)
        stream = cache.stream(T, length_B)
        if pos_BT is None and not stream.begins:
            pos_BT = stream.order(x_BTD)
        return Context(stream, pos_BT, cache=cache, trace=trace, readout=readout)

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
        exit: float | None = None,
    ) -> None:
        """Turns the compute dial: the capacities and the number of steps of all loops, and the
        threshold of their exits.

        ``capacity``: one for all routed steps, or one for each; 0 skips a step, 1 takes all tokens.
        ``steps``: steps beyond the trained ones use the weights of the last one. ``exit``: a token
        stops looping at this threshold, see `archdsl.blocks.exit`. None: as trained.
        Raises DialError, and changes nothing, if a loop cannot be run so.
        """
        if not self.loops and (capacity, steps, exit) != (None, None, None):
            raise DialError(f"{self.spec.name} has no loops: there is nothing to dial")
        if capacity is not None and not self.routers:
            raise DialError(f"{self.spec.name} has no routers, so there is no capacity to dial")
        leaving = [loop for loop in self.loops if loop.thresholds]
        if exit is not None and not leaving:
            raise DialError(f"{self.spec.name} has no loop with an exit, so there is none to dial")
        before = [loop.passes for loop in self.loops]
        try:
            for loop in self.loops:
                loop.dial(capacity, steps)
            if exit is not None:
                for loop in leaving:
                    loop.dial_exit(exit)
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

    def router_counts(self) -> dict[str, tuple[int, int]]:
        """How many tokens each routed step selected in the last pass, and of how many, by loop and
        step. A loop that another one runs several times counts all its runs."""
        found = [count for pair in self.trace.counts.values() for count in pair]
        there = [count for count in found if isinstance(count, Tensor)]
        told = iter(torch.stack(there).tolist() if there else [])  # one transfer for all
        known = [next(told) if isinstance(count, Tensor) else count for count in found]
        return dict(zip(self.trace.counts, zip(known[::2], known[1::2], strict=True), strict=True))

    def router_shares(self) -> dict[str, float]:
        """The share of tokens that each routed step selected in the last pass, by loop and step."""
        counts = self.router_counts()
        return {name: selected / max(1, tokens) for name, (selected, tokens) in counts.items()}

    def predictor_accuracies(self) -> dict[str, float]:
        """The share of correct predictions of predictor routers, by loop and step."""
        return {name: share.item() for name, share in self.trace.accuracies.items()}

    def commit(self) -> None:
        """Adds to the statistics of routers and experts what the last batch showed.

        The first training pass after the weights changed does that for the batch before: passes
        with equal weights are parts of one batch, and what they show counts once.
        """
        for one in self.counting:
            one.commit()


def final_norm(spec: ModelSpec) -> nn.RMSNorm | nn.LayerNorm | nn.Identity:
    """The norm before the head; the identity in a model without one."""
    if not spec.final_norm:
        return nn.Identity()
    return make_norm(spec.norm, spec.dim, spec.norm_eps)


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
