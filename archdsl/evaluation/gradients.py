"""Measure where a model's gradients are large, for easy and for hard samples and tokens.

Chen et al. 2502.13842 (Figure 2) compare the nuclear norms of the gradients of attention matrices
between samples that GPT-2 answers rightly and wrongly. A hard sample has a larger loss, which
alone makes gradients larger. Therefore each norm is also given with two controls:

- *normalised*: divided by the norm of the gradient of the same loss at the logits. A loss that is
  multiplied by a constant has the same normalised norm.
- *matched*: the gradient of the mean loss of some tokens of each sample. Each easy sample forms a
  pair with a hard one, and each of these tokens with a token of the other sample that has the same
  loss, up to 5%. So both sides of a pair have equally many tokens, of equal losses; they differ
  in what stands around these tokens.

Shapes: W windows, T tokens, J losses, R resamples, C columns (uses of matrices, and sums of them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from archdsl.data.types import IGNORE, Batch, Data, HeldOut
from archdsl.errors import ArchdslError
from archdsl.evaluation.evaluate import check_data_fits, cross_entropy, evaluation_mode
from archdsl.evaluation.gradient_sample import (
    DECILES,
    Bools,
    Floats,
    Ints,
    Sample,
    choose_sample,
    matched_tokens,
)
from archdsl.evaluation.weight_gradients import Matrix, Use, attentions, window_norms
from archdsl.lang.strict import Strict
from archdsl.model.build import require_model
from archdsl.model.language_model import LanguageModel

RESAMPLES = 2000
LONGEST = 128  # tokens of a window by default


class Interval(Strict):
    """A figure with the limits of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Contrast(Strict):
    """The mean norm of easy windows, that of hard ones, and the second divided by the first.

    ``ratio`` is None where the first is zero.
    """

    easy: Interval
    hard: Interval
    ratio: Interval | None


class Row(Strict):
    """The norms of one use of a matrix, see `Use` for ``layer``, ``step`` and ``matrix``.

    ``raw``, ``normalised`` and ``matched``: of whole windows, see the module; ``matched`` is None
    if no tokens could be matched. ``tokens`` and ``tokens_normalised``: of single tokens, in the
    mean over each decile of the loss.
    """

    layer: int | None
    step: tuple[int, ...] | None
    matrix: Matrix
    raw: Contrast
    normalised: Contrast
    matched: Contrast | None
    tokens: tuple[Interval, ...]
    tokens_normalised: tuple[Interval, ...]

    @property
    def use(self) -> Use:
        """Which use this is."""
        return Use(self.layer, self.step, self.matrix)


class Sides(Strict):
    """The mean loss of the easy and of the hard windows, in nats per token."""

    easy: float
    hard: float


class Spike(Strict):
    """A layer whose norm is above those of both neighbours, in whole windows of one group.

    ``height``: the norm divided by the larger one of the two others. Its interval is above 1.
    """

    layer: int
    height: Interval


class Spikes(Strict):
    """The spikes of easy and of hard windows."""

    easy: tuple[Spike, ...]
    hard: tuple[Spike, ...]


class Gradients(Strict):
    """The nuclear norms of the gradients of a model's attention matrices.

    ``windows``: the number of windows, of ``context`` tokens each; ``group``: how many of them are
    easy, and as many are hard. ``tokens``: target positions. ``loss``: nats per target position.
    ``loss_of_groups``: that of easy and hard windows. ``matched_tokens``: how many tokens could be
    matched, in all pairs; ``loss_of_matched``: their losses, None if there are none.
    ``loss_of_deciles``: the mean loss of the tokens of each decile. ``total``: the sum of the norms
    over all layers, steps and matrices. ``spikes``: of the sum over the matrices of each layer, all
    steps of a weight together. ``before``: the same for the model to compare with.
    """

    split: HeldOut
    windows: int
    context: int
    tokens: int
    loss: float
    group: int
    loss_of_groups: Sides
    matched_tokens: int
    loss_of_matched: Sides | None
    loss_of_deciles: tuple[float, ...]
    total: Row
    rows: tuple[Row, ...]
    spikes: Spikes
    before: Gradients | None = None


def gradients(
    model: LanguageModel,
    data: Data,
    *,
    before: LanguageModel | None = None,
    split: HeldOut = "validation",
    windows: int = 32,
    context: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> Gradients:
    """Measure the nuclear norm of the gradient of each attention matrix, for each thinking step.

    The gradient of a step is that through its own use of the weight; the gradients of all steps add
    up to that of the weight. A whole window's loss is the mean over its target positions. The
    quarter of the windows with the lowest loss is easy, that with the highest loss is hard. For
    single tokens, one token of each decile of the loss is drawn in each window, and the gradient is
    that of its loss alone. Intervals are percentiles of 2000 bootstrap samples of windows.

    ``before``: another model, measured on the same windows and tokens; which of them are easy or
    hard is then decided by the mean of both models' losses. ``windows``: how many, spread evenly
    over ``split``. ``context``: tokens per window; default: the spec's, at most 128.
    ``batch_size``: windows per pass; the time hardly depends on it, the memory does. ``progress``:
    show a progress bar on stderr.

    A router that looks at later tokens does so here as in training. The mode of the models and the
    state of the random numbers are left unchanged. Raises ArchdslError if a model has no attention,
    if the data do not fit, if a loss is not finite, or if fewer than four windows or ten tokens
    have a target.
    """
    models = [model] if before is None else [model, before]
    for one in models:
        require_model(one)
    context = context or min(LONGEST, *(one.spec.context for one in models))
    for one in models:
        attentions(one)
        check_data_fits(one.spec, data, context)
    batches = _batches(data, split, windows, context, batch_size)
    losses = [_token_losses(one, batches, context) for one in models]
    sample = choose_sample(batches, np.mean(losses, axis=0), f"the {split} split of {data.name}")
    found = [
        _measured(one, sample, loss_WT, split, progress)
        for one, loss_WT in zip(models, losses, strict=True)
    ]
    return found[0].model_copy(update={"before": found[1]}) if before else found[0]


def _batches(
    data: Data, split: HeldOut, windows: int, context: int, batch_size: int
) -> list[Batch]:
    """The windows that have a target."""
    found = []
    for batch in data.held_out(split, batch_size, context, windows * context):
        keep_B = (batch.targets_BT != IGNORE).any(1)
        if keep_B.any():
            found.append(Batch(batch.tokens_BT[keep_B], batch.targets_BT[keep_B]))
    return found


def _token_losses(model: LanguageModel, batches: Sequence[Batch], context: int) -> Floats:
    """The loss of each token in nats, [W, T]; NaN where there is no target.

    Raises ArchdslError if a loss is not finite.
    """
    device = next(model.parameters()).device
    found = [np.empty((0, context))]
    with evaluation_mode(model):
        for batch in batches:
            loss_BT = cross_entropy(
                model(batch.tokens_BT.to(device)), batch.targets_BT.to(device)
            ).cpu()
            if not loss_BT.isfinite().all():
                raise ArchdslError(
                    f"the loss of {model.spec.name} is not finite: it cannot be used"
                )
            loss_BT = loss_BT.double().masked_fill(batch.targets_BT == IGNORE, torch.nan)
            room = context - loss_BT.size(1)  # the last window may be shorter
            found.append(np.pad(loss_BT.numpy(), ((0, 0), (0, room)), constant_values=np.nan))
    return np.concatenate(found)


class _Measure(NamedTuple):
    """The norms of J losses of each window: of the whole window, of its matched tokens, and of a
    token of each decile.

    ``raw_JWC`` and ``normalised_JWC``; ``there_JW``: whether there are such tokens.
    ``columns``: what the C columns are.
    """

    columns: list[Use]
    raw_JWC: Floats
    normalised_JWC: Floats
    there_JW: Bools


WHOLE, MATCHED, FIRST_DECILE = 0, 1, 2  # the J losses


def _measured(
    model: LanguageModel, sample: Sample, loss_WT: Floats, split: HeldOut, progress: bool
) -> Gradients:
    matched_WT = matched_tokens(sample, loss_WT)
    measure = _measure(model, sample, loss_WT, matched_WT, progress)
    rows = _rows(measure, sample)
    return Gradients(
        split=split,
        windows=len(loss_WT),
        context=loss_WT.shape[1],
        tokens=int((~np.isnan(loss_WT)).sum()),
        loss=float(np.nanmean(loss_WT)),
        group=len(sample.easy),
        loss_of_groups=_mean_losses(loss_WT, sample, ~np.isnan(loss_WT)),
        matched_tokens=int(matched_WT.sum()) // 2,
        loss_of_matched=_mean_losses(loss_WT, sample, matched_WT) if matched_WT.any() else None,
        loss_of_deciles=tuple(
            float(loss_WT[sample.decile_WT == number].mean()) for number in range(DECILES)
        ),
        total=rows[-1],
        rows=tuple(rows[:-1]),
        spikes=_spikes(measure, sample),
    )


def _mean_losses(loss_WT: Floats, sample: Sample, chosen_WT: Bools) -> Sides:
    easy, hard = (loss_WT[group][chosen_WT[group]].mean() for group in (sample.easy, sample.hard))
    return Sides(easy=float(easy), hard=float(hard))


def _measure(
    model: LanguageModel,
    sample: Sample,
    loss_WT: Floats,
    matched_WT: Bools,
    progress: bool,
) -> _Measure:
    chosen_JWT = np.stack([~np.isnan(loss_WT), matched_WT, *sample.drawn_JWT])
    count_JW1 = chosen_JWT.sum(-1, keepdims=True)
    weight_JWT = torch.from_numpy(chosen_JWT / np.maximum(1, count_JW1))
    at_logits, nuclear, start = [], [], 0
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        for batch in track(
            sample.batches, "gradients", console=Console(stderr=True), disable=not progress
        ):
            B, T = batch.tokens_BT.shape
            norms = window_norms(model, batch, weight_JWT[:, start : start + B, :T])
            at_logits.append(norms.at_logits_JB.double().numpy())
            nuclear.append({use: norm.double().numpy() for use, norm in norms.nuclear.items()})
            start += B
    columns = _with_sums(_joined(nuclear, at_logits))
    raw_JWC = np.stack(list(columns.values()), -1)
    at_logits_JW1 = np.concatenate(at_logits, 1)[..., None]
    zero = np.zeros_like(raw_JWC)
    normalised_JWC = np.divide(raw_JWC, at_logits_JW1, out=zero, where=at_logits_JW1 > 0)
    return _Measure(list(columns), raw_JWC, normalised_JWC, count_JW1[..., 0] > 0)


def _joined(
    nuclear: Sequence[Mapping[Use, Floats]], at_logits: Sequence[Floats]
) -> dict[Use, Floats]:
    """The norms of all batches by use, [J, W]; zero where no token of a batch took a step."""
    uses = dict.fromkeys(use for batch in nuclear for use in batch)
    return {
        use: np.concatenate(
            [
                batch.get(use, np.zeros_like(like))
                for batch, like in zip(nuclear, at_logits, strict=True)
            ],
            axis=1,
        )
        for use in sorted(uses, key=Use.order)
    }


def _with_sums(norms: dict[Use, Floats]) -> dict[Use, Floats]:
    """The norms with the sum over the matrices of each layer and step, and last the total."""
    found: dict[Use, Floats] = {}
    total = np.zeros_like(next(iter(norms.values())))
    for use, norm_JW in norms.items():
        of_all = use._replace(matrix="all")
        if of_all not in found:
            found[of_all] = np.zeros_like(norm_JW)
        found[of_all] = found[of_all] + norm_JW
        found[use] = norm_JW
        total = total + (norm_JW if use.step is not None else 0)
    return found | {Use(None, None, "all"): total}


def _rows(measure: _Measure, sample: Sample) -> list[Row]:
    """The figures of each column."""
    whole = [
        contrasts(norm_JWC[WHOLE], sample.easy, sample.hard)
        for norm_JWC in (measure.raw_JWC, measure.normalised_JWC)
    ]
    paired = measure.there_JW[MATCHED, sample.easy]
    matched: Sequence[Contrast | None] = [None] * len(measure.columns)
    if paired.any():
        of_pairs = sample.easy[paired], sample.hard[paired]
        matched = contrasts(measure.raw_JWC[MATCHED], *of_pairs, paired=True)
    tokens = [
        _means(norm_JWC[FIRST_DECILE:], measure.there_JW[FIRST_DECILE:])
        for norm_JWC in (measure.raw_JWC, measure.normalised_JWC)
    ]
    return [
        Row(
            layer=use.layer,
            step=use.step,
            matrix=use.matrix,
            raw=whole[0][column],
            normalised=whole[1][column],
            matched=matched[column],
            tokens=tuple(of_decile[column] for of_decile in tokens[0]),
            tokens_normalised=tuple(of_decile[column] for of_decile in tokens[1]),
        )
        for column, use in enumerate(measure.columns)
    ]


def contrasts(norm_WC: Floats, easy: Ints, hard: Ints, *, paired: bool = False) -> list[Contrast]:
    """The contrast of the windows ``easy`` and ``hard`` in each column.

    ``paired``: the windows at the same place are drawn together.
    """
    easy_RE = _resamples(len(easy), seed=0)
    hard_RE = easy_RE if paired else _resamples(len(hard), seed=1)
    easy_C, easy_RC = norm_WC[easy].mean(0), easy_RE @ norm_WC[easy]
    hard_C, hard_RC = norm_WC[hard].mean(0), hard_RE @ norm_WC[hard]
    known_C = easy_RC.min(axis=0) > 0
    one_C = np.where(known_C, easy_C, 1.0)
    ratios = _intervals(hard_C / one_C, hard_RC / np.where(known_C, easy_RC, 1.0))
    return [
        Contrast(easy=low, hard=high, ratio=ratio if known else None)
        for low, high, ratio, known in zip(
            _intervals(easy_C, easy_RC), _intervals(hard_C, hard_RC), ratios, known_C, strict=True
        )
    ]


def _means(norm_JWC: Floats, there_JW: Bools) -> list[list[Interval]]:
    """For each of J losses the mean of each column over the windows that are there."""
    found = []
    for norm_WC, there_W in zip(norm_JWC, there_JW, strict=True):
        norm_NC = norm_WC[there_W]
        found.append(_intervals(norm_NC.mean(0), _resamples(len(norm_NC), seed=0) @ norm_NC))
    return found


def _spikes(measure: _Measure, sample: Sample) -> Spikes:
    """The spikes in the gradients of whole weights."""
    whole = {use.layer for use in measure.columns if use.step is None}
    layers: dict[int, Floats] = {}
    for use, norm_W in zip(measure.columns, measure.raw_JWC[WHOLE].T, strict=True):
        of_weights = use.step is None or use.layer not in whole
        if use.matrix == "all" and use.layer is not None and of_weights:
            layers[use.layer] = layers.get(use.layer, 0.0) + norm_W
    norm_WL = np.stack(list(layers.values()), -1)
    return Spikes(easy=spikes(norm_WL[sample.easy]), hard=spikes(norm_WL[sample.hard]))


def spikes(norm_WL: Floats) -> tuple[Spike, ...]:
    """The spikes in the norms of L layers; the first and the last one have no two neighbours."""
    if norm_WL.shape[1] < 3:
        return ()
    value_L, *drawn = (
        mean_L[..., 1:-1] / np.maximum(mean_L[..., :-2], mean_L[..., 2:])
        for mean_L in (norm_WL.mean(0), _resamples(len(norm_WL), seed=0) @ norm_WL)
    )
    heights = enumerate(_intervals(value_L, drawn[0]), 1)
    return tuple(Spike(layer=layer, height=height) for layer, height in heights if height.low > 1)


def _resamples(count: int, seed: int) -> Floats:
    """The weights of ``count`` observations in the means of bootstrap samples, [R, count]."""
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return drawn / count


def _intervals(value_C: Floats, drawn_RC: Floats) -> list[Interval]:
    low_C, high_C = np.percentile(drawn_RC, (2.5, 97.5), axis=0)
    return [
        Interval(value=value, low=low, high=high)
        for value, low, high in zip(value_C.tolist(), low_C.tolist(), high_C.tolist(), strict=True)
    ]
