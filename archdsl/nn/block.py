"""The interface of blocks: a stream in, a stream of the same shape out, and the context of a pass.

Shapes: B batch, T tokens of the stream (all tokens of the sequence, or those that a router
selected), H query heads, G key/value heads, S keys, E head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.nn.cache import Cache, Count, LayerCache, Memory, Stream, shifted
from archdsl.nn.gather import pick, take
from archdsl.nn.precision import autocast_dtype
from archdsl.nn.rope import RopeScaling, inverse_frequencies


class Primitive(nn.Module):
    """A module that draws the initial values of its own parameters.

    Blocks, routers and step encodings are primitives. What a primitive was built as from its spec
    can be found with `built_as`. ``number``: its place among the modules of its language model.
    ``place``: the end of its name, after that of the layer that it is in, by which the cache of the
    layer knows it. Both are equal in copies of the model.
    """

    number: int = 0
    place: str = ""

    def begin_pass(self) -> None:
        """Called before each training pass. Adds to its statistics what the last batch showed,
        unless this pass is a further part of that batch: the weights are still the same."""

    def commit(self) -> None:
        """Adds to its statistics what the last batch showed."""

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the parameters that this module holds itself, not those of primitives inside it.

        ``depth``: see `stream_depth`. By default, every linear map that is a direct child gets
        values from N(0, 1 / fan_in), so that it keeps the scale of what it reads.
        """
        for child in self.children():
            if isinstance(child, nn.Linear):
                normal_(child.weight, child.in_features**-0.5, rng)

    def built_as(self, field: str) -> list[nn.Module]:
        """The modules that the parts in ``field`` of the spec were built as.

        None, one, or several copies. Where the field holds a list of n parts, there are n modules,
        or n for each copy, one copy after the other. By default: the attribute of the same name,
        a module or a ModuleList. Override it where the attribute has another name.
        """
        found = getattr(self, field, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
        return [found] if isinstance(found, nn.Module) else []


class BatchStatistics(Primitive):
    """A primitive that keeps statistics of training batches, each of which counts once.

    ``pending``: what the last training pass showed, by the place that it was seen at, so that a
    place which is computed again does not count twice. ``parts``: what the passes before it showed
    with equal weights, which are parts of one batch. ``version``: that of these weights.
    ``mean_over_ranks``: where several processes compute parts of one batch, the mean of a tensor
    over them; None: this process is alone, or the others may not be at the same place.
    ``counted_by_caller``: whether nothing but a call of `commit` ends a batch.
    """

    mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    counted_by_caller: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[Hashable, Tensor] = {}
        self.parts: dict[Hashable, list[Tensor]] = {}
        self.version: int | None = None

    def begin_pass(self) -> None:
        """See `Primitive`. Optimizers change weights in place, which counts a version."""
        self.seen()
        weight = next(self.parameters())
        if not self.counted_by_caller and self.version != weight._version:
            self.commit()
            self.version = weight._version

    def seen(self) -> dict[Hashable, list[Tensor]]:
        """What the passes of this batch showed so far; see ``parts``."""
        for place, seen in self.pending.items():
            self.parts.setdefault(place, []).append(seen)
        self.pending.clear()
        return self.parts

    @torch.no_grad()
    def commit(self) -> None:
        """Adds to its statistics what the last batch showed."""
        self.add(self.seen())
        self.parts.clear()

    def add(self, parts: Mapping[Hashable, Sequence[Tensor]]) -> None:
        """Changes the statistics by what one batch showed, by place and in its parts."""
        raise NotImplementedError


class Block(Primitive):
    """A module that maps a stream x_BTD to a stream of the same shape.

    ``writes_to_stream``: whether this block itself holds a matrix whose product is added to the
    stream, as attention and feed-forward do. Norms, and blocks that only run other blocks, set it
    to False. See `stream_depth`. ``hosted``: whether the block works with the attention and the
    cache of a `Host`: of other tokens it learns through ``Context.host`` alone, or nothing.
    """

    writes_to_stream: ClassVar[bool] = True
    hosted: bool = False

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The new stream [B, T, D]."""
        raise NotImplementedError

    def pass_over(self, ctx: Context) -> None:
        """Brings what it keeps for a pass up to date where no token of the chunk takes the pass.

        Called only for blocks that have written to ``Context.handed``. By default, does nothing.
        """

    def side_by_side(self) -> Iterable[Sequence[nn.Linear]]:
        """The linear maps that this block applies to the same input by `Context.linears`."""
        return ()

    def unrolled(self) -> Iterable[nn.Module]:
        """The blocks that this one runs one after the other and nothing else; default: itself."""
        return (self,)

    if TYPE_CHECKING:

        def __call__(self, x_BTD: Tensor, ctx: Context) -> Tensor: ...  # noqa: D102  for type checkers alone


def normal_(weight: Tensor, std: float, rng: torch.Generator) -> None:
    """Fills ``weight`` in place with values from N(0, std^2)."""
    nn.init.normal_(weight, std=std, generator=rng)


def into_stream_(weight: Tensor, fan_in: int, rng: torch.Generator, depth: int) -> None:
    """Fills a matrix that writes to the stream, so that 2 * depth of them keep its variance near 1.

    ``fan_in``: how many numbers the matrix reads for each that it writes.
    """
    normal_(weight, (2 * depth * fan_in) ** -0.5, rng)


def stream_depth(model: nn.Module) -> int:
    """Half the number of blocks in ``model`` that write to the stream, rounded up, at least 1.

    That is the number of layers, where each is an attention and a feed-forward block.
    """
    blocks = (module for module in model.modules() if isinstance(module, Block))
    return max(1, (sum(block.writes_to_stream for block in blocks) + 1) // 2)


@dataclass(frozen=True)
class KeysValues:
    """The keys and values that queries attend to, with their positions.

    ``order_BS``: the place of each in the stream it was computed from; None: 0, 1, ...
    """

    k_BGSE: Tensor
    v_BGSE: Tensor
    pos_BS: Tensor | None
    order_BS: Tensor | None = None

    def followed_by(self, other: KeysValues) -> KeysValues:
        """These and then those of ``other``; both have an order, and both positions or neither."""
        assert self.order_BS is not None
        assert other.order_BS is not None
        pos_BS = None
        if self.pos_BS is not None and other.pos_BS is not None:
            pos_BS = _side_by_side(self.pos_BS, other.pos_BS)
        return KeysValues(
            torch.cat((self.k_BGSE, other.k_BGSE), 2),
            torch.cat((self.v_BGSE, other.v_BGSE), 2),
            pos_BS,
            _side_by_side(self.order_BS, other.order_BS),
        )


def _side_by_side(one_BS: Tensor, other_BS: Tensor) -> Tensor:
    rows = max(len(one_BS), len(other_BS))  # those of all rows may be given once
    return torch.cat((one_BS.expand(rows, -1), other_BS.expand(rows, -1)), 1)


class Host(Protocol):
    """The attention and the cache of a framework that a model runs in, in place of its own."""

    def keep(self, module: Primitive, path: tuple[int, ...], new: KeysValues) -> KeysValues:
        """Adds the keys and values of a chunk to the cache, and returns all that there are.

        ``path``: see `Context`."""
        ...

    def attend(self, module: Primitive, q_BHTE: Tensor, kv: KeysValues) -> Tensor:
        """What each query reads, [B, H, T, E]. ``kv``: what `keep` last returned for ``module``."""
        ...


@dataclass
class Trace:
    """What happened in a pass, by loop and routed step.

    A layer notes it by their names within the layer, in a trace of its own; see `for_layer`.

    ``counts``: how many tokens were selected, and of how many. ``losses``: losses of routers, to be
    added to that of the model. ``accuracies``: of predictors. Where another loop runs a loop
    several times, its counts and losses are added up, and its accuracies are those of the last run.
    ``steps_BT``: how many steps each token took in all loops, without the first pass of each.
    ``passes``: in training, where the loss is a sum over passes of the last block, the stream
    [B, T, D] after each of them and the weights [B, T] of the losses of its tokens.
    """

    counts: dict[str, tuple[Count, Count]] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    accuracies: dict[str, Tensor] = field(default_factory=dict)
    steps_BT: Tensor | None = None
    passes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def for_layer(self) -> Trace:
        """An empty trace for one layer, but for what all layers add to."""
        return Trace({}, {}, {}, self.steps_BT, self.passes)

    def take_over(self, layer: Trace, name: str) -> None:
        """Adds what a layer of this name noted."""
        self.counts |= {f"{name}{place}": found for place, found in layer.counts.items()}
        self.losses |= {f"{name}{place}": found for place, found in layer.losses.items()}
        self.accuracies |= {f"{name}{place}": found for place, found in layer.accuracies.items()}

    def put_back(self, index_BT: Tensor) -> None:
        """Brings what is known of each token into the order of the places ``index_BT``."""
        if self.steps_BT is not None:
            self.steps_BT = self.steps_BT.gather(1, index_BT)
        self.passes = [(take(x_BTD, index_BT), w.gather(1, index_BT)) for x_BTD, w in self.passes]

    def count(self, name: str, selected: Count, tokens: Count) -> None:
        """Counts what a routed step selected; there may be counts of an earlier run already."""
        if name in self.counts:
            before, of = self.counts[name]
            selected, tokens = before + selected, of + tokens
        self.counts[name] = (selected, tokens)

    def add_loss(self, name: str, loss: Tensor) -> None:
        """Adds a loss; there may be one already, where a loop around runs a block several times."""
        self.losses[name] = self.losses[name] + loss if name in self.losses else loss


@dataclass
class Part:
    """A part of a loop in a static decoding step, and what the parts hand on to each other.

    The first part runs the passes that take every token, each of the others one routed pass. Every
    part ends by asking the router about the routed passes after it, P in all, so that the host can
    leave out those that no row takes.

    ``selected_PB``: which rows take each pass, as far as the last part could tell: no row takes a
    pass between. ``score_PB``: their scores. ``at``: the place of the routed pass
    among the P; None: the first part. ``start_BTD``: the input of the loop. ``handed``: see
    `Context`.
    """

    selected_PB: Tensor
    score_PB: Tensor
    at: int | None = None
    start_BTD: Tensor | None = None
    handed: dict[Block, KeysValues] | None = None


@dataclass(frozen=True)
class Context:
    """What a block may use besides the stream.

    ``stream``: how many tokens came before this chunk, and which of its tokens are no padding.
    ``pos_BT``: the position of each token in the sequence, also after routing; None: 0, 1, 2, ...
    ``place_BT``: the index of each token in the chunk that the model was given; None: 0, 1, 2, ...
    ``order_BT``: the index of each token in the stream that the last router selected it from.
    ``whole``: the context of the stream that the last router selected from, and which tokens it
    selected; None: every token takes the pass.
    ``handed``: the keys and values that the passes of a loop so far hand on, by attention module;
    None: a pass reads only those that it computes. ``kv``: see `LoopSpec`.
    ``cache``: the state of the tokens before; ``kept``: that of this layer. ``path``: the steps of
    the loops around this block, because each step has a state of its own.
    ``trace``: what happens in the pass. ``tables``: rotary angles that were computed already.
    ``host``: whose attention and cache are used; None: the model's own.
    ``added``: what the pass of a loop around adds to the results of linear maps, by linear map.
    ``passes``: where the last layer, a loop, adds the stream after each of its passes that gets a
    gradient; None: nowhere.
    ``readout``: the logits of a stream, by the last norm and the head; None: where there is none.
    ``part``: which part of the next loop is to be run; None: all of it.
    ``noise_B``: what the random numbers of each row are drawn by in training; None: torch's state.
    """

    stream: Stream = field(default_factory=Stream)  # not a default: Dynamo of torch 2.11
    pos_BT: Tensor | None = None
    place_BT: Tensor | None = None
    order_BT: Tensor | None = None
    whole: tuple[Context, Tensor, Tensor | None] | None = None
    handed: dict[Block, KeysValues] | None = None
    kv: str = "own"
    cache: Cache | None = None
    kept: LayerCache | None = None
    path: tuple[int, ...] = ()
    trace: Trace = field(default_factory=Trace)
    tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    host: Host | None = None
    added: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    passes: list[Tensor] | None = None
    readout: Callable[[Tensor], Tensor] | None = None
    part: Part | None = None
    noise_B: Tensor | None = None

    def linear(self, matrix: nn.Linear, x: Tensor) -> Tensor:
        """The product of a linear map with ``x`` [..., inputs], and what this pass adds to it."""
        y = cast(Tensor, matrix(x))
        more = self.added.get(matrix)
        return y if more is None else y + more(x)

    def linears(self, matrices: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
        """The products of linear maps without biases with the same ``x``, as of `linear`.

        In half precision, as on a GPU, one product computes all of them: it is larger, and the
        matrices are copied to that precision anyway. So it does in static decoding after `join_`,
        because the time of a product with one token is hardly that of its numbers.
        """
        dtype = autocast_dtype(x.device)
        alone = any(one in self.added or not _is_plain(one, x) for one in matrices)
        if alone or (dtype is None and not self.stream.static):
            return [self.linear(one, x) for one in matrices]
        joined = _joined(matrices) if dtype is None else None
        if dtype is not None:
            joined, x = torch.cat([one.weight.to(dtype) for one in matrices]), x.to(dtype)
        if joined is None:
            return [self.linear(one, x) for one in matrices]
        return list(F.linear(x, joined).split([one.out_features for one in matrices], -1))

    def at(self, index_BK: Tensor, stream: Stream, keep_BK: Tensor | None = None) -> Context:
        """The context of the selected tokens at ``index_BK``, which are a chunk of ``stream``.

        ``keep_BK``: False where an entry only fills up its row; None: all are selected.
        """
        pos_BT = _picked(self.pos_BT, index_BK)
        return replace(
            self,
            whole=(self, index_BK, keep_BK),
            stream=stream,
            pos_BT=pos_BT,
            place_BT=_picked(self.place_BT, index_BK),
            order_BT=shifted(index_BK, self.stream.past),
            tables=self.tables if pos_BT is self.pos_BT else {},
        )

    def memory(self, module: Primitive) -> Memory | None:
        """The state that ``module`` keeps for this step; None in a pass without a cache."""
        return None if self.kept is None else self.kept.memory((module.place, self.path))

    def count_step(self, x_BTD: Tensor) -> None:
        """Counts a further step for each of these tokens that is no padding."""
        if self.trace.steps_BT is None:
            return
        real_BT = self.stream.real(x_BTD)
        real_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.bool) if real_BT is None else real_BT
        if self.trace.steps_BT.size(1) == 1:
            self.trace.steps_BT.add_(real_BT)
            return
        place_BT = Stream().order(x_BTD) if self.place_BT is None else self.place_BT
        self.trace.steps_BT.scatter_add_(1, place_BT.expand_as(real_BT), real_BT.long())

    def rope(
        self, x_BHTE: Tensor, theta: float, scaling: RopeScaling | None = None
    ) -> tuple[Tensor, Tensor]:
        """The cosines of the rotary angles and the sines, shaped to multiply x_BHTE.

        The sines of the first half of a head are negative. They are computed once a pass.
        """
        T, E = x_BHTE.shape[-2:]
        # T only where it counts: as a symbol, it cannot be looked up
        key = (theta, scaling, T if self.pos_BT is None else None, E, x_BHTE.dtype)
        if key not in self.tables:
            found = self._selected_angles((theta, scaling, E, x_BHTE.dtype))
            self.tables[key] = found or self._angles(x_BHTE, theta, scaling)
        return self.tables[key]

    def _selected_angles(self, wanted: tuple[object, ...]) -> tuple[Tensor, Tensor] | None:
        """Those of the selected tokens, if those of all tokens were computed already."""
        if self.whole is None:
            return None
        all_tokens, index_BK, _ = self.whole
        for (theta, scaling, _, E, dtype), tables in all_tokens.tables.items():
            if (theta, scaling, E, dtype) == wanted:
                cos, sin = (_rows_of(table, index_BK) for table in tables)
                return cos, sin
        return None

    def _angles(
        self, x_BHTE: Tensor, theta: float, scaling: RopeScaling | None
    ) -> tuple[Tensor, Tensor]:
        T, E = x_BHTE.shape[-2:]
        # half precision cannot tell neighbouring positions apart after a few thousand tokens
        precise = torch.float64 if x_BHTE.dtype == torch.float64 else torch.float32
        pos = self.pos_BT if self.pos_BT is not None else torch.arange(T, device=x_BHTE.device)
        freq = inverse_frequencies(theta, E, scaling, dtype=precise, device=x_BHTE.device)
        angle = pos.to(precise).unsqueeze(-1) * freq
        if angle.dim() == 3:
            angle = angle.unsqueeze(1)  # heads
        cos, sin = angle.cos().to(x_BHTE.dtype), angle.sin().to(x_BHTE.dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _is_plain(matrix: nn.Linear, x: Tensor) -> bool:
    """Whether the weight can be read where ``x`` is: not one that is quantised, sharded or
    offloaded, nor a linear map of another class."""
    weight = matrix.weight
    return type(matrix) is nn.Linear and type(weight) is nn.Parameter and weight.device == x.device


def join_(matrices: Sequence[nn.Linear]) -> None:
    """Moves the weights of linear maps into one matrix, one below the other, of which they are
    parts from then on; see `Context.linears`."""
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([one.weight for one in matrices])
        parts = joined.split([one.out_features for one in matrices])
        for one, part in zip(matrices, parts, strict=True):
            one.weight.data = part
    matrices[0].joined = joined


def _joined(matrices: Sequence[nn.Linear]) -> Tensor | None:
    """The matrix that `join_` made of these; None if there is none, or they are elsewhere now."""
    first = matrices[0]
    joined = cast(Tensor | None, getattr(first, "joined", None))
    if joined is None or torch.compiler.is_compiling():
        return joined
    parts = joined.split([one.out_features for one in matrices])
    if [part.data_ptr() for part in parts] == [one.weight.data_ptr() for one in matrices]:
        return joined
    del first.joined
    return None


def _rows_of(table: Tensor, index_BK: Tensor) -> Tensor:
    """The rows of a table [T, E] or [1 or B, 1, T, E], [B, 1, K, E]."""
    if table.dim() == 2:
        return table[index_BK].unsqueeze(1)
    rows = table.squeeze(1).expand(len(index_BK), -1, -1)
    return take(rows, index_BK).unsqueeze(1)


def _picked(numbers_BT: Tensor | None, index_BK: Tensor) -> Tensor:
    if numbers_BT is None:
        return index_BK
    return pick(numbers_BT, index_BK)


def rotate(x_BHTE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2104.09864) with LLaMA's convention of halves.

    ``table``: what `Context.rope` returned. The result has the shape of x_BHTE.
    """
    cos, sin = table
    halves_swapped = x_BHTE.roll(x_BHTE.size(-1) // 2, -1)
    return torch.addcmul(x_BHTE * cos, halves_swapped, sin)
