"""How well a model predicts text it was not trained on.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from archdsl.data.types import IGNORE, Batch, Data, HeldOut
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec, Strict
from archdsl.model.language_model import LanguageModel


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Nats per token, [B, T], at least in float32; 0 where the target is IGNORE."""
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    loss = F.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return loss.view_as(targets_BT)


class Evaluation(Strict):
    """Held-out quality. ``loss`` is in nats per token; ``standard_error`` is the loss's, taken
    over windows; ``accuracy`` is the share of the asked positions whose best guess is right.

    ``leaks``: a router chose with sight of later tokens, so the loss is too good to be true;
    ``causal`` then holds the figures without that sight.
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
) -> Evaluation:
    """Scores the held-out windows of ``split``, of ``context`` tokens each (default: the spec's).

    A leaking model is scored twice, as trained and causally. The model's mode and the state of
    the random numbers are as before afterwards. Raises ArchdslError if the split asks nothing.
    """

    context = context or model.spec.context
    check_data_fits(model.spec, data, context)

    def evaluated(leaks: bool) -> Evaluation:
        batches = data.held_out(split, batch_size, context, limit_tokens)
        with evaluation_mode(model):
            scores = [score_batch(model, batch) for batch in batches]
        score_3W = scored_windows(scores, data, split)
        return _summary(score_3W, split, data.bytes_per_token(split), leaks)

    if not model.leaks:
        return evaluated(leaks=False)
    with model.causal_routing():
        causal = evaluated(leaks=False)
    return evaluated(leaks=True).model_copy(update={"causal": causal})


def check_data_fits(spec: ModelSpec, data: Data, context: int) -> None:
    """Raises ArchdslError if the model cannot take the data's tokens or windows of ``context``."""
    if data.vocab_size > spec.vocab_size:
        raise ArchdslError(
            f"{data.name} has {data.vocab_size:,} different tokens, "
            f"but {spec.name} only a vocab_size of {spec.vocab_size:,}"
        )
    if context > spec.context:
        raise ArchdslError(
            f"a context of {context:,} tokens was asked for, "
            f"but {spec.name} takes at most {spec.context:,}"
        )


@contextmanager
def evaluation_mode(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode and its own random numbers, the same every time; both undone at the end."""
    training = model.training
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        seed_torch(0, device)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def seed_torch(seed: int, device: torch.device) -> None:
    """The generators of the CPU and of ``device``: torch.manual_seed takes a third of a
    millisecond more for devices that are not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def score_batch(model: LanguageModel, batch: Batch) -> Tensor:
    """Loss (a sum, in nats), predictions asked and right answers of each window: [3, B].

    A function of its own, so that the logits are gone before the next batch makes new ones.
    """
    device = next(model.parameters()).device
    targets_BT = batch.targets_BT.to(device)
    logits_BTV = model(batch.tokens_BT.to(device))
    loss_BT = cross_entropy(logits_BTV, targets_BT)
    asked_BT = targets_BT != IGNORE
    right_BT = logits_BTV.argmax(-1) == targets_BT  # IGNORE is no token
    # double: float32 stops counting single tokens at 16M
    return torch.stack([x_BT.double().sum(1).cpu() for x_BT in (loss_BT, asked_BT, right_BT)])


def scored_windows(scores: Sequence[Tensor], data: Data, split: HeldOut) -> Tensor:
    """The scores of those windows that ask something, [3, W]; raises ArchdslError without any."""
    score_3W = torch.cat([torch.empty(3, 0), *scores], dim=1)
    if not score_3W[1].any():
        raise ArchdslError(f"the {split} split of {data.name} asks for no prediction")
    return score_3W[:, score_3W[1] > 0]


def ratio_of_sums(sum_W: Tensor, asked_W: Tensor) -> tuple[float, float | None]:
    """The mean over all that was asked, and its standard error over windows.

    Of a ratio of sums, as windows may ask differently often (Cochran, Sampling Techniques, 6.4).
    """
    asked, windows = float(asked_W.sum()), len(asked_W)
    mean = float(sum_W.sum()) / asked
    spread = float((sum_W - mean * asked_W).square().sum())
    return mean, math.sqrt(spread * windows / (windows - 1)) / asked if windows > 1 else None


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    return bytes_per_token and loss / math.log(2) / bytes_per_token


def _summary(
    score_3W: Tensor, split: HeldOut, bytes_per_token: float | None, leaks: bool
) -> Evaluation:
    loss_W, asked_W, right_W = score_3W
    loss, error = ratio_of_sums(loss_W, asked_W)
    return Evaluation(
        split=split,
        tokens=int(asked_W.sum()),
        loss=loss,
        standard_error=error,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, a float is infinite
        bits_per_byte=bits_per_byte(loss, bytes_per_token),
        accuracy=float(right_W.sum() / asked_W.sum()),
        leaks=leaks,
    )
