"""The cache: what a model keeps of the tokens so far, such as their keys and values.

There is one entry for every module that looks back and every step that runs it, which holds only
what that step computed. An entry has memory for all that can still come from the start: a routed
step's is as much smaller as its capacity says.

Rows of a batch may have got unequally far. Their real tokens stand first, what fills up a chunk
stands last and is never kept.

A cache can be made static: then one token of each row comes at a time, counts are tensors that
change in place, and no shape and no branch depends on any number that a tensor holds.

Shapes: B batch, T tokens of a chunk, S tokens kept, G heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import Tensor

from archdsl.errors import ArchdslError

Count = int | Tensor  # the same for every row, or one for each, [B]
Key = tuple[str, tuple[int, ...]]  # the place of a module in its layer, and the step
Found = TypeVar("Found")


class ContextFullError(ArchdslError):
    """More tokens than the context of the model, or than the room of the cache."""


@dataclass(frozen=True)
class Stream:
    """A chunk of tokens in its sequence: ``past`` tokens went before it.

    ``length_B``: how many of the chunk's tokens are real; None: all. ``limit``: how many the
    sequence can ever have; 0 where nothing is kept. ``static``: of one token a row, see above.
    ``known``: what `once` has computed; a copy by ``replace`` knows nothing yet.
    """

    past: Count = 0
    length_B: Tensor | None = None
    limit: int = 0
    static: bool = False
    known: dict[Hashable, object] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def once(self, key: Hashable, compute: Callable[[], Found]) -> Found:
        """What ``compute`` returns, which depends on the stream alone. It is called once for each
        key, and all layers share the result; compiled layers do so only in a static stream."""
        if torch.compiler.is_compiling() and not self.static:
            return compute()
        if key not in self.known:
            self.known[key] = compute()
        return cast(Found, self.known[key])

    def places(self, limit: int, outer: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """Where each row of a static cache writes its token, as an index: the rows, all places of
        the dimensions ``outer``, and the places among ``limit`` and a spare one."""
        assert isinstance(self.past, Tensor)
        place_B = self.past % limit
        if self.length_B is not None:
            place_B = torch.where(self.length_B > 0, place_B, limit)
        each = [torch.arange(n, device=place_B.device) for n in (len(place_B), *outer)]
        return (*torch.meshgrid(*each, indexing="ij"), place_B.view(-1, *[1] * len(outer)))

    def advance(self) -> None:
        """Counts the tokens of this chunk as past, where a static cache counts them."""
        if self.static and isinstance(self.past, Tensor):
            assert self.length_B is not None
            self.past.add_(self.length_B)

    @property
    def begins(self) -> bool:
        """Whether no row has tokens before this chunk."""
        return isinstance(self.past, int) and self.past == 0

    def order(self, x_BT: Tensor) -> Tensor:
        """The place of each token among those of its sequence, [1 or B, T]."""
        if isinstance(self.past, Tensor) and x_BT.size(1) == 1:
            return self.past.unsqueeze(1)
        place_1T = torch.arange(x_BT.size(1), device=x_BT.device).unsqueeze(0)
        return shifted(place_1T, self.past)

    def real(self, x_BT: Tensor) -> Tensor | None:
        """True where a token is no padding, [B, T]; None: everywhere."""
        if self.length_B is None:
            return None
        if x_BT.size(1) == 1:
            return self.once("real", lambda: cast(Tensor, self.length_B).unsqueeze(1) > 0)
        place_T = torch.arange(x_BT.size(1), device=x_BT.device)
        return place_T < self.length_B.unsqueeze(1)

    def tokens(self, x_BT: Tensor) -> int | Tensor:
        """The number of tokens in all rows together, without padding."""
        return x_BT.size(0) * x_BT.size(1) if self.length_B is None else self.length_B.sum()

    def after(self, tokens: int) -> Count:
        """The ``past`` of the next chunk, after these tokens."""
        end = self.past + (tokens if self.length_B is None else self.length_B)
        return end if self.static else alike(end)

    def reach(self, tokens: int) -> int:
        """The number of tokens of the longest row, this chunk included."""
        return self._furthest(self.after(tokens))

    @property
    def begin(self) -> int:
        """The number of tokens before this chunk in the longest row."""
        return self._furthest(self.past)

    def _furthest(self, count: Count) -> int:
        """The largest count; the limit if the cache is static."""
        if self.static:
            return self.limit
        return count if isinstance(count, int) else int(count.max())


def column(count: Count) -> Count:
    """The count in a shape that can be added to a [B, T]."""
    return count if isinstance(count, int) else count.unsqueeze(1)


def shifted(place_BT: Tensor, count: Count) -> Tensor:
    """Places after ``count`` tokens before the first of each row."""
    return place_BT if isinstance(count, int) and count == 0 else place_BT + column(count)


def alike(count: Count) -> Count:
    """One number if it is the same for all rows, because then most chunks need no mask."""
    if isinstance(count, int):
        return count
    first = int(count[0])
    return first if bool((count == first).all()) else count


class Kept:
    """Entries of each row, [B, ..., S, E], filled from the left; the oldest make room for new.

    ``limit``: how many entries a row has room for. In a static cache there is one place more at the
    end, to which rows that have no token write.
    """

    def __init__(self, like: Tensor, limit: int) -> None:
        self.limit = limit
        self.data = like.new_zeros(*like.shape[:-2], limit, like.size(-1))

    def grow(self, limit: int) -> None:
        """Makes room for ``limit`` entries. So far none was overwritten: all keep their places."""
        self.data = torch.cat((self.read(limit), self._empty(limit - self.limit)), -2)
        self.limit = limit

    def _empty(self, places: int) -> Tensor:
        return self.data.new_zeros(*self.data.shape[:-2], places, self.data.size(-1))

    def write(self, new: Tensor, stream: Stream) -> None:
        """Adds a chunk, [B, ..., T, E]."""
        if stream.static:
            self._write_one(new, stream)
            return
        T, past = new.size(-2), stream.past
        if isinstance(past, int) and stream.length_B is None and past + T <= self.limit:
            self.data.narrow(-2, past, T).copy_(new)
            return
        new_BT = new.movedim(-2, 1)
        order_BT = stream.order(new_BT).expand(new_BT.shape[:2])
        written_BT = order_BT >= column(stream.after(T)) - self.limit
        real_BT = stream.real(new_BT)
        if real_BT is not None:
            written_BT = written_BT & real_BT
        b, t = written_BT.nonzero(as_tuple=True)
        self.data.movedim(-2, 1)[b, order_BT[b, t] % self.limit] = new_BT[b, t]

    def _write_one(self, new: Tensor, stream: Stream) -> None:
        """A token of each row; a row that has none writes to the place behind all entries."""
        if self.data.size(-2) == self.limit:
            self.data = torch.cat((self.data, self._empty(1)), -2)
        outer = tuple(new.shape[1:-2])
        # not by a view in another order, for which inductor would copy all entries
        key = (self.limit, *outer)
        self.data[stream.once(key, lambda: stream.places(self.limit, outer))] = new.select(-2, 0)

    def read(self, stop: int) -> Tensor:
        """The first ``stop`` entries of each row, as far as there are so many."""
        return self.data.narrow(-2, 0, min(stop, self.limit))

    def order(self, past: Count) -> Tensor:
        """Which token of its sequence each entry is, [1 or B, S]; negative: none yet."""
        last = torch.as_tensor(past, device=self.data.device).reshape(-1, 1) - 1
        return last - (last - torch.arange(self.limit, device=self.data.device)) % self.limit


class State:
    """A tensor of fixed size for each row, [B, ...], that every chunk brings up to date.

    It is what a recurrence or a convolution hands on to the next tokens. ``data`` holds zeros
    before the first token.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def write(self, after_BT: Tensor, stream: Stream) -> None:
        """Takes the state after the last real token of each row.

        ``after_BT``: the state after each token of the chunk, [B, T, ...]. A row that has no real
        token keeps the state it has.
        """
        if stream.length_B is None:
            self.replace(after_BT[:, -1])
            return
        rows_B = torch.arange(len(after_BT), device=after_BT.device)
        last_B = after_BT[rows_B, (stream.length_B - 1).clamp(min=0)]
        some_B = (stream.length_B > 0).view(-1, *[1] * (last_B.dim() - 1))
        self.replace(torch.where(some_B, last_B, self.data))

    def replace(self, new_B: Tensor) -> None:
        """Takes ``new_B``, [B, ...], for every row. The tensor stays the same, as a CUDA graph
        needs it."""
        self.data.copy_(new_B)


@dataclass
class Memory:
    """What one module keeps for one step: tensors by name, and how many tokens it has let by.

    ``kept`` grows by an entry for each token; ``states`` have a fixed size. ``threshold``: the
    least score that a token is let by with; None: not looked up yet, or there is none.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    taken: Count = 0
    threshold: float | None = None

    def state(self, name: str, x_BT: Tensor, *shape: int) -> State:
        """The state of this name, [B, *shape]; zeros of the dtype of ``x_BT`` when it is new."""
        if name not in self.states:
            self.states[name] = State(x_BT.new_zeros(len(x_BT), *shape))
        return self.states[name]

    def named(self, name: str, like: Tensor, limit: int) -> Kept:
        """The entries called ``name``, made for tensors like ``like`` when first asked for.

        ``limit``: how many of them there can ever be; more than before if the cache has grown.
        """
        if name not in self.kept:
            self.kept[name] = Kept(like, limit)
        elif self.kept[name].limit < limit:
            self.kept[name].grow(limit)
        return self.kept[name]


class RowsError(ArchdslError):
    """A batch of another size than the one that a cache was begun with."""


@dataclass(frozen=True)
class LayerCache:
    """What is kept for the modules of a layer, by their places in it: equal layers have equal keys,
    so that they are equal to a compiler. ``like``: a count of tokens."""

    memories: dict[Key, Memory]
    like: Count = 0

    def memory(self, key: Key) -> Memory:
        """What is kept for a module and a step, made when first asked for."""
        if key not in self.memories:
            like = self.like
            self.memories[key] = Memory(taken=like if isinstance(like, int) else like * 0)
        return self.memories[key]


class Cache:
    """Everything that is kept of the tokens so far. Use it for one model and one batch.

    It holds tensors and numbers alone, so that it can be copied (`copy.deepcopy` branches from a
    common prompt) and pickled. ``rows``: the size of the batch; None while it is empty.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.rows: int | None = None
        self.length: Count = 0  # tokens so far
        self.settings: object = None  # of the dial, when the first token came
        self.static = False
        # by the name of the layer, the place of the module in it, and the step
        self._memories: dict[str, dict[Key, Memory]] = {}

    def check_rows(self, rows: int) -> None:
        """Notes the size of the first batch. Raises RowsError at one of another size."""
        if self.rows not in (None, rows):
            raise RowsError(
                f"the cache was begun with a batch of {self.rows} rows, and this one has {rows}; "
                "give each batch a cache of its own, or repeat the rows of the cache first"
            )
        self.rows = rows

    def stream(self, tokens: int, length_B: Tensor | None) -> Stream:
        """The next chunk's. Raises ContextFullError, with the cache as it was; a static cache
        leaves that question to the caller."""
        stream = Stream(self.length, length_B, self.max_length, self.static)
        if stream.reach(tokens) > self.max_length:
            raise ContextFullError(
                f"{stream.reach(tokens):,} tokens exceed the {self.max_length:,} "
                "that this cache has room for; begin anew with fewer of them, or call its grow()"
            )
        return stream

    def grow(self, max_length: int) -> None:
        """Makes room for ``max_length`` tokens of each row, if there is less.

        A static cache is static no longer.
        """
        self.static = False
        self.max_length = max(self.max_length, max_length)

    def move(self, length: Count) -> None:
        """Sets the number of tokens so far."""
        if self.static and isinstance(self.length, Tensor):
            self.length.copy_(torch.as_tensor(length))
        else:
            self.length = length

    def of_layer(self, name: str) -> LayerCache:
        """What is kept for the modules of a layer."""
        return LayerCache(self._memories.setdefault(name, {}), self.length if self.static else 0)

    @property
    def memories(self) -> Iterator[tuple[Key, Memory]]:
        """All that is kept, by the place of the module in its layer and the step."""
        return chain.from_iterable(memories.items() for memories in self._memories.values())

    def make_static(self, rows: int, device: torch.device) -> None:
        """Makes the cache static: from now on, each of ``rows`` gets one token at a time."""

        def counts(count: Count) -> Tensor:
            return torch.as_tensor(count, device=device).expand(rows).clone()

        self.static, self.length = True, counts(self.length)
        for _, memory in self.memories:
            memory.taken = counts(memory.taken)

    def reorder(self, index_B: Tensor) -> None:
        """Row ``i`` becomes what row ``index_B[i]`` was; rows may be doubled or left out.

        A static cache is static no longer.
        """
        self.static, self.rows = False, len(index_B)

        def rows(count: Count) -> Count:
            return count if isinstance(count, int) else alike(picked(count))

        def picked(data: Tensor) -> Tensor:
            return data.index_select(0, index_B.to(data.device))

        self.length = rows(self.length)
        for _, memory in self.memories:
            memory.taken = rows(memory.taken)
            for kept in memory.kept.values():
                kept.data = picked(kept.data)
            for state in memory.states.values():
                state.data = picked(state.data)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, those in use or not, and of all states."""
        memories = [memory for _, memory in self.memories]
        tensors = [kept.data for memory in memories for kept in memory.kept.values()]
        tensors += [state.data for memory in memories for state in memory.states.values()]
        return sum(data.numel() * data.element_size() for data in tensors)
