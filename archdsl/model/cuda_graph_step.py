"""Decoding of one token for every row at fixed shapes; on CUDA as captured graphs.

A graph is launched at once, and what it computes cannot depend on a choice of the host. A routed
pass is worth a question to the host: on an H100, a pass of the 162M spec takes .2 ms (measured),
and waiting for the host .02 ms (estimated). So the step is captured in pieces. A piece ends with a
loop's full passes and asks the loop's router which rows would take each of the routed passes after
them. While no row takes one, the stream stays as it is, so that all of them can be asked at once.
The host then launches the first pass that some row takes, for all rows; the result is dropped for
the others. That pass is a piece, too, and asks about the passes after it. Where a loop cannot be
run in parts, see `Loop.skippable`, every routed pass is computed for every row.

Shapes: B rows, D width, P routed passes of a loop, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from archdsl.errors import ArchdslError
from archdsl.model.backbone import Call
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context, Part
from archdsl.nn.cache import Cache, ContextFullError, Count
from archdsl.nn.loop import Loop, Step
from archdsl.nn.precision import autocast_dtype


@dataclass
class Section:
    """Layers up to a loop whose routed passes can be left out. In the last section there is none.

    ``steps``: these passes. ``part``: the part of the loop that is run. ``told_PB``: which rows
    take each pass, on the host.
    """

    layers: list[nn.Module]
    steps: list[Step]
    part: Part
    told_PB: Tensor


class TokenStep:
    """Decodes one token at a time after those that ``cache`` holds.

    The cache must not be used elsewhere from now on. There are no gradients, and the model stays in
    its mode. On CUDA the weights may change in place, but must not move. Rows that have ended stay
    in the batch, because a graph has a fixed batch size.

    ``compiled``: whether layers are compiled by ``backend`` before they are captured. There is a
    compilation of some seconds for the first layer, for equal layers after it, and for each piece
    of a loop, so it is for long generations. Raises an error of torch if a layer cannot be one
    graph.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        rows: int,
        compiled: bool = False,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.model, self.cache = model, cache
        self.call: Call | None = None
        device = model.embedding.weight.device
        cache.make_static(rows, device)
        self.lengths: list[int] = torch.as_tensor(cache.length).tolist()  # what Python knows
        self.tokens_B1 = torch.full((rows, 1), -1, dtype=torch.long, device=device)
        self.ctx = Context()
        dtype = autocast_dtype(device) or model.embedding.weight.dtype
        self.x_B1D = torch.zeros(rows, 1, model.spec.dim, dtype=dtype, device=device)
        self.logits_BV = torch.empty(0)
        self.sections = list(self._sections())
        self.graphs: dict[tuple[int, int | None], torch.cuda.CUDAGraph] = {}
        # without any token nothing changes, but the memory of every step is allocated
        self._compute_all()
        if compiled:
            self.call = _compiled(model, backend)
            self._compute_all()
        if device.type == "cuda":
            self._capture()

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The logits [B, V] after one more token for each row; -1 stands for no token.

        The next call overwrites them. Raises ContextFullError, and leaves the cache unchanged, if a
        row is full; ArchdslError if the rows of the cache were reordered; DialError if the compute
        dial was turned.
        """
        self.lengths = self._checked(tokens)
        self.tokens_B1.copy_(torch.tensor(tokens).unsqueeze(1), non_blocking=True)
        real = sum(token >= 0 for token in tokens)
        counts: dict[str, tuple[Count, Count]] = {}
        for n, section in enumerate(self.sections):
            told = self._run_section(n)
            selected = zip(section.steps, map(sum, told), strict=True)
            counts |= {step.name: (count, real) for step, count in selected}
        # of loops that are not run in parts, the trace knows the counts
        self.model.trace = replace(self.ctx.trace, counts=self.ctx.trace.counts | counts)
        return self.logits_BV

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """The lengths of the rows with these tokens."""
        if not self.cache.static:
            raise ArchdslError("the rows of the cache were reordered: make another TokenStep")
        self.model.check_dial(self.cache)
        lengths = [n + (token >= 0) for n, token in zip(self.lengths, tokens, strict=True)]
        if max(lengths) > self.cache.max_length:
            raise ContextFullError(
                f"this cache has room for {self.cache.max_length:,} tokens of a row, no more"
            )
        return lengths

    def _sections(self) -> Iterator[Section]:
        layers: list[nn.Module] = []
        for layer in self.model.layers:
            layers.append(layer)
            if isinstance(layer, Loop) and layer.skippable:
                yield self._section(layers, layer.skippable)
                layers = []
        yield self._section(layers, [])

    def _section(self, layers: list[nn.Module], steps: list[Step]) -> Section:
        score_PB = self.x_B1D.new_zeros(len(steps), len(self.x_B1D))
        selected_PB = torch.zeros_like(score_PB, dtype=torch.bool)
        told_PB = torch.zeros(score_PB.shape, dtype=torch.bool, pin_memory=score_PB.is_cuda)
        return Section(layers, steps, Part(selected_PB, score_PB), told_PB)

    def _run_section(self, n: int) -> list[list[bool]]:
        """Runs a section without the passes that no row takes; returns which rows take each."""
        self._run(n, None)
        told, P = self._told(n), len(self.sections[n].steps)
        at = 0
        while at < P:
            if any(told[at]):
                self._run(n, at)
                told = self._told(n) if at + 1 < P else told
            at += 1
        return told

    def _told(self, n: int) -> list[list[bool]]:
        """Which rows take each routed pass of a section. Waits for the device."""
        section = self.sections[n]
        on_cuda = section.part.selected_PB.is_cuda
        section.told_PB.copy_(section.part.selected_PB, non_blocking=on_cuda)
        if section.steps and on_cuda:
            torch.cuda.current_stream().synchronize()
        return cast(list[list[bool]], section.told_PB.tolist())

    def _run(self, n: int, at: int | None) -> None:
        if self.graphs:
            self.graphs[n, at].replay()
        else:
            self._compute(n, at)

    def _compute(self, n: int, at: int | None) -> None:
        device = self.x_B1D.device
        dtype = autocast_dtype(device)
        # a captured graph must not read weights from the cache of autocast, which ends before it
        uncached = dtype and torch.autocast(device.type, dtype, cache_enabled=False)
        with torch.no_grad(), uncached or nullcontext():
            self._compute_piece(n, at)

    def _compute_piece(self, n: int, at: int | None) -> None:
        """Computes a piece: the layers of section ``n`` with the full passes of its loop, or the
        routed pass ``at`` of the loop."""
        section = self.sections[n]
        x_BTD, ctx, layers = self.x_B1D, self.ctx, section.layers
        if at is not None:
            # what it computes is not there for others, as it may be left out
            stream = replace(ctx.stream)
            stream.known.update(ctx.stream.known)
            ctx, layers = replace(ctx, stream=stream, tables=dict(ctx.tables)), layers[-1:]
        elif n == 0:
            x_BTD = self.model.embedding(self.tokens_B1.clamp(min=0)).to(x_BTD.dtype)
            real_B = (self.tokens_B1[:, 0] >= 0).long()
            ctx = self.ctx = self.model.begin(x_BTD, real_B, self.cache)
        for layer in layers:
            in_parts = section.steps and layer is layers[-1]
            section.part.at = at
            here = replace(ctx, part=section.part) if in_parts else ctx
            x_BTD = self.model.run_layer(layer, x_BTD, here, self.call)
        if section is not self.sections[-1]:
            self.x_B1D.copy_(x_BTD)
            return
        self.model.end(x_BTD, ctx)
        self.logits_BV = self.model.readout(x_BTD[:, -1])

    def _pieces(self) -> Iterator[tuple[int, int | None]]:
        for n, section in enumerate(self.sections):
            yield n, None
            for at in range(len(section.steps)):
                yield n, at

    def _compute_all(self) -> None:
        for n, at in self._pieces():
            self._compute(n, at)

    def _capture(self) -> None:
        """Captures a graph of each piece, in the order in which they run, so that they can share
        memory. Steps on another stream come first, to initialise libraries."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute_all()
        torch.cuda.current_stream().wait_stream(side)
        pool, graphs = torch.cuda.graph_pool_handle(), {}
        for n, at in self._pieces():
            graphs[n, at] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[n, at], pool=pool):
                self._compute(n, at)
        self.graphs = graphs


def _compiled(model: LanguageModel, backend: str | Callable[..., Any]) -> Call:
    """Calls a layer compiled as one graph. Equal layers share it, unless they share keys."""
    dynamo, loops = torch._dynamo.config, model.loops
    pieces = 3 + max((len(loop.skippable) for loop in loops), default=0)
    # an argument of `compile` from torch 2.13 on; several models may be compiled in a process
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64 + pieces * len(model.layers))
    return torch.compile(_call, backend=backend, fullgraph=True, dynamic=False)


def _call(layer: nn.Module, x_BTD: Tensor, ctx: Context) -> Tensor:
    return cast(Tensor, layer(x_BTD, ctx))
