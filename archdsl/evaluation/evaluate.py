"""Measure how well a model predicts data that it was not trained on.

The data decide which positions of a window have a target. All figures are taken over these target
positions alone.

Shapes: B windows of a batch, W windows of a split, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from archdsl.data.types import IGNORE, Batch, Data, HeldOut
from archdsl.errors import ArchdslError, blamed_on
from archdsl.lang.spec import ModelSpec
from archdsl.lang.strict import Strict
from archdsl.model.build import require_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.devices import in_float64, random_state_kept, seed_torch
from archdsl.nn.ranks import Ranks


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the loss of each token in nats, [B, T], computed in float32 or higher precision.

    It is 0 where the target is IGNORE.
    """
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    loss = F.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return loss.view_as(targets_BT)


class Evaluation(Strict):
    """The quality of a model on held-out data.

    ``tokens``: the number of target positions.
    ``loss``: nats per target position. ``standard_error``: of the loss, taken over windows; None
    for a single window.
    ``bits_per_byte``: the loss in bits per byte of text; None for data that are not text.
    ``accuracy``: the share of the target positions at which the most likely token is the target.
    ``leaks``: True if a router looked at later tokens, so that the loss is lower than any decoder
    can reach. ``causal`` then holds the figures with causal routing.
    """

    split: HeldOut
    tokens: int
    loss: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    leaks: bool
    causal: Evaluation | None = None


def evaluate(
    model: LanguageModel,
    data: Data,
    *,
    split: HeldOut = "validation",
    batch_size: int = 16,
    context: int | None = None,
    limit_tokens: int | None = None,
    ranks: Ranks | None = None,
    watched: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Measure the loss of ``model`` on the held-out windows of ``split``.

    ``batch_size``: windows per forward pass. ``context``: tokens per window; default: the spec's.
    ``limit_tokens``: the largest number of tokens to read; default: all. ``ranks``: the processes
    that call this together, each with its share of the model and of the work; default: this one.
    ``watched``: gives the context of each forward pass whose scores count.

    A model whose router looks at later tokens is measured twice: as trained, and with causal
    routing. The mode of the model and the state of the random numbers are left unchanged. Raises
    ArchdslError if the data do not fit the model or the split has no target positions.
    """
    require_model(model)
    context = context or model.spec.context
    check_data_fits(model.spec, data, context)

    def evaluated(leaks: bool) -> Evaluation:
        batches = data.held_out(split, batch_size, context, limit_tokens)
        with evaluation_mode(model, sharded=ranks is not None and ranks.size > 1):
            scores = _scores(model, batches, ranks, watched)
        score_3W = scored_windows(scores, data, split)
        return _summary(score_3W, split, data.bytes_per_token(split), leaks)

    if not model.leaks:
        return evaluated(leaks=False)
    with model.causal_routing():
        causal = evaluated(leaks=False)
    return evaluated(leaks=True).model_copy(update={"causal": causal})


def _scores(
    model: LanguageModel,
    batches: Iterator[Batch],
    ranks: Ranks | None,
    watched: Callable[[], AbstractContextManager[object]],
) -> list[Tensor]:
    """`score_batch` of each batch, computed by all processes."""
    ranks, mine = ranks or Ranks(torch.device("cpu")), []
    for batch, own in ranks.own(batches):
        with watched() if own else nullcontext():
            score_3B = score_batch(model, batch)
        if own:
            mine.append(score_3B)
    return [score_3B for everyones in ranks.gather(mine) for score_3B in everyones]


def check_data_fits(spec: ModelSpec, data: Data, context: int) -> None:
    """Check that the model can read the data in windows of ``context`` tokens.

    Raises ArchdslError if the vocabulary of the data is larger than the model's, or the context is
    longer than the model's, or if they are no data.
    """
    if not hasattr(data, "vocab_size"):
        raise ArchdslError(
            f"data are needed, which archdsl.load_data(SOURCE) returns; got {reprlib.repr(data)}"
        )
    if data.vocab_size > spec.vocab_size:
        raise ArchdslError(
            f"{data.name} has {data.vocab_size:,} different tokens, "
            f"but {spec.name} has only a vocab_size of {spec.vocab_size:,}"
        )
    if context > spec.context:
        message = (
            f"a context of {context:,} tokens was requested, "
            f"but {spec.name} takes at most {spec.context:,}"
        )
        with blamed_on("context"):
            raise ArchdslError(message)


@contextmanager
def evaluation_mode(model: LanguageModel, sharded: bool = False) -> Iterator[None]:
    """Switch to evaluation mode, no gradients and seed 0; restore everything afterwards.

    ``sharded``: whether the weights are divided among processes.
    """
    training = model.training
    device = next(model.parameters()).device
    # weights that are gathered in inference mode could not be trained afterwards
    without_gradient = torch.no_grad() if sharded else torch.inference_mode()
    with random_state_kept(device), without_gradient:
        seed_torch(0, device)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def score_batch(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the summed loss in nats, the number of targets and of correct predictions, [3, B].

    This is a function so that the logits are freed before the next batch is computed.
    """
    device = next(model.parameters()).device
    targets_BT = batch.targets_BT.to(device)
    logits_BTV = model(batch.tokens_BT.to(device))
    loss_BT = cross_entropy(logits_BTV, targets_BT)
    is_target_BT = targets_BT != IGNORE
    correct_BT = logits_BTV.argmax(-1) == targets_BT  # never true for IGNORE, which is no token
    # In float64, as float32 cannot count single tokens beyond 16M.
    return torch.stack(
        [in_float64(x_BT).sum(1).cpu() for x_BT in (loss_BT, is_target_BT, correct_BT)]
    )


def scored_windows(scores: Sequence[Tensor], data: Data, split: HeldOut) -> Tensor:
    """Join the scores of all batches and drop windows without a target, [3, W].

    Raises ArchdslError if no window has a target.
    """
    score_3W = torch.cat([torch.empty(3, 0), *scores], dim=1)
    if not score_3W[1].any():
        raise ArchdslError(f"the {split} split of {data.name} has no target to predict")
    return score_3W[:, score_3W[1] > 0]


def ratio_of_sums(sum_W: Tensor, targets_W: Tensor) -> tuple[float, float | None]:
    """Return the mean per target position and its standard error over windows.

    ``sum_W``: the sum of each window. ``targets_W``: its number of target positions, which may
    differ between windows. The error is that of a ratio of sums (Cochran, Sampling Techniques,
    6.4), and None for a single window.
    """
    targets, windows = float(targets_W.sum()), len(targets_W)
    mean = float(sum_W.sum()) / targets
    spread = float((sum_W - mean * targets_W).square().sum())
    return mean, math.sqrt(spread * windows / (windows - 1)) / targets if windows > 1 else None


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Convert nats per token to bits per byte; None if the data are not text."""
    return bytes_per_token and loss / math.log(2) / bytes_per_token


def _summary(
    score_3W: Tensor, split: HeldOut, bytes_per_token: float | None, leaks: bool
) -> Evaluation:
    loss_W, targets_W, correct_W = score_3W
    loss, error = ratio_of_sums(loss_W, targets_W)
    return Evaluation(
        split=split,
        tokens=int(targets_W.sum()),
        loss=loss,
        standard_error=error,
        perplexity=math.exp(min(loss, 700.0)),  # the exponential of a larger loss overflows a float
        bits_per_byte=bits_per_byte(loss, bytes_per_token),
        accuracy=float(correct_W.sum() / targets_W.sum()),
        leaks=leaks,
    )
