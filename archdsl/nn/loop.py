"""What a model asks of blocks that run others in several passes, and of the routers in them.

A `Loop` runs a body pass by pass. A `Router` selects the tokens that take a pass. A block that is
computed in another way, but is to be dialled, measured and checked like the loops of archdsl,
inherits from these two classes.

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from archdsl.errors import ArchdslError
from archdsl.nn.block import Block, Context, Primitive
from archdsl.nn.cache import Stream

if TYPE_CHECKING:
    from archdsl.lang.spec import BlockSpec


class DialError(ArchdslError):
    """A number of steps or a capacity that a model cannot be run at."""

    exit_status = 2


class Step(NamedTuple):
    """A routed pass of a loop.

    ``name``: the loop and the number of the routed pass; ``key``: the same without the name of the
    layer that the loop is in, so that equal layers are equal to a compiler. ``row``: which row of
    the router's weights it uses. ``capacity``: the share of all tokens that it may select.
    ``among``: the share of all tokens that it may choose from.
    """

    name: str
    row: int
    capacity: float
    among: float
    key: str = ""


class Pass(NamedTuple):
    """One pass of a loop through its body.

    ``step``: the number of the pass. ``like``: the trained step whose weights it uses. ``routed``:
    how its tokens are selected; None: every token takes it. ``learns``: whether the pass gets a
    gradient in training. ``exit``: the threshold of the loop's exit; tokens that have reached it do
    not take the pass; None: there is no exit.
    """

    step: int
    like: int
    routed: Step | None
    learns: bool = True
    exit: float | None = None


@dataclass(frozen=True)
class Selection:
    """The tokens that a router selected: distinct, and in the order of the sequence.

    ``index_BK``: their places in the chunk. Rows with fewer than K selected tokens are filled up
    with others. ``score_BK``: their scores, from which their weights follow, without a gradient;
    None: there are none. ``keep_BK``: False where an entry only fills up its row; None: all are
    selected. ``stream``: what the selected tokens are a chunk of, counting those that the same pass
    selected of earlier chunks.
    """

    index_BK: Tensor
    score_BK: Tensor | None
    keep_BK: Tensor | None
    stream: Stream

    def mask(self, tokens: int) -> Tensor:
        """True where a token is selected, [B, T], for a chunk of T = ``tokens``."""
        index_BK, keep_BK = self.index_BK, self.keep_BK
        mask_BT = torch.zeros(len(index_BK), tokens, dtype=torch.bool, device=index_BK.device)
        return mask_BT.scatter_(1, index_BK, True if keep_BK is None else keep_BK)


class Router(Primitive):
    """Selects the tokens of the routed passes of one loop.

    ``learned``: whether `scores` are the log-odds of a learned choice.
    ``sees_later_tokens_in_training``: whether it does so in training and never otherwise.
    ``salt``: the number of this router in its model. ``causal``: an entry for each
    `selecting_causally` block that runs now, in whatever thread; while there is one, a router that
    otherwise looks at later tokens (``leaks``) selects without them. ``z_loss`` and ``aux_loss``:
    the weights of its losses in training, see `TrainingSpec`.
    """

    learned: ClassVar[bool] = False
    sees_later_tokens_in_training: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.salt = 0
        self.z_loss = self.aux_loss = 0.0
        self.causal: list[None] = []

    def forward(self, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None) -> Selection:
        """Selects the tokens of the pass ``at``, only among ``active_BT`` [B, T] if it is given."""
        raise NotImplementedError

    def weights(self, x_BKD: Tensor, at: Step, chosen: Selection) -> Tensor | None:
        """The weights [B, K] of the new values of the selected tokens ``x_BKD``; None: 1.

        By them the router learns. The gradient of a learned weight reaches the stream here, where
        there are only the selected tokens.
        """
        return None

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        """A score for each token, [B, T]; tokens with a high score are selected."""
        raise NotImplementedError

    def skips(self, x_BTD: Tensor, passes: Sequence[Pass], ctx: Context) -> int:
        """How many of the next ``passes`` in a row no token takes, where that is cheap to know.

        `forward` is then not called for them. The stream ``x_BTD`` is the same in all of them;
        ``ctx``: that of the loop. By default 0.
        """
        return 0

    @property
    def leaks(self) -> bool:
        """Whether a choice depends on later tokens when the model is used, not trained."""
        return False

    def forget_statistics(self) -> bool:
        """Starts its statistics of scores anew. Returns whether it has any."""
        return False

    def serve_every_capacity(self) -> None:
        """Prepares for a training at many capacities, none of which is the main one."""


class Loop(Block):
    """A block that runs a body in passes, whose number and capacities can be changed: dialled.

    ``spec``: what it was built from. ``label``: its name in the model, which begins the name of
    each routed pass. ``place``: the end of its name, after that of the layer that it is in.
    ``passes``: the passes that it runs now. ``bodies``: one block, or one for each pass. ``steps``:
    the number of passes it was trained with. ``full_steps``: how many of them take every token.
    ``most_steps``: how many it can run; None: any number. ``thresholds``: some at which its exit
    may be dialled, see `dial_exit`; none without an exit. ``needs_readout``: whether it uses
    `Context.readout`.
    """

    thresholds: Sequence[float] = ()
    needs_readout: bool = False

    spec: BlockSpec
    label: str
    place: str
    passes: list[Pass]
    bodies: nn.ModuleList
    router: Router | None
    steps: int
    full_steps: int
    most_steps: int | None

    def dial(
        self, capacity: Sequence[float] | float | None = None, steps: int | None = None
    ) -> None:
        """Sets the capacities of the routed passes and the number of passes; None: as trained.

        ``capacity``: one for all, or one for each pass that may be routed. Raises DialError where
        the loop cannot be run so.
        """
        raise NotImplementedError

    def dial_exit(self, threshold: float | None = None) -> None:
        """Sets the threshold at which tokens stop looping; None: as trained. Called after `dial`.

        Raises DialError where the loop has no exit, or none at that threshold.
        """
        raise DialError(f"{self.label}: has no exit")

    @property
    def skippable(self) -> list[Step]:
        """The routed passes that decoding can leave out where no row takes them, see `Part`."""
        return []

    def as_run(self, spec: BlockSpec, shares: Sequence[float]) -> BlockSpec:
        """``spec``, a spec of this kind, with one pass for each of ``shares`` of the tokens."""
        raise NotImplementedError


@contextmanager
def selecting_causally(routers: Iterable[Router]) -> Iterator[None]:
    """Within the block, these routers select without sight of later tokens."""
    changed = list(routers)
    for router in changed:
        router.causal.append(None)
    try:
        yield
    finally:
        for router in changed:
            router.causal.pop()
