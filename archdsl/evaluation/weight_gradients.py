"""The gradient of a loss through each use of an attention matrix, and its nuclear norm.

The steps of a loop share a weight W. Each of them uses it in a product y = x W^T of its own. The
gradient through one use alone, with the other uses held fixed, is (dL/dy)^T x, summed over the
tokens of the use. By the chain rule these gradients add up to the gradient of W.

Shapes: J losses, B windows, T tokens, K tokens of a use, I inputs and O outputs of a matrix,
V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from archdsl.blocks.modules.attention import Attention
from archdsl.data.types import Batch
from archdsl.errors import ArchdslError
from archdsl.evaluation.evaluate import cross_entropy
from archdsl.model.language_model import LanguageModel

Matrix = Literal["all", "q", "k", "v", "o"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)[1:]


class Use(NamedTuple):
    """A use of an attention matrix, or several uses together.

    ``layer``: the number of the attention block in the model; the first one is 0. Where the steps
    of a loop have weights of their own, their attention blocks have one number. None: all layers.
    ``step``: the number of the step of each loop around the block, outer loops first; the first
    step is 1. Empty outside loops. None: all steps that use the same weight.
    ``matrix``: the map to queries (q), keys (k) or values (v), or the output (o); ``all``: the sum
    of the norms of the four.
    """

    layer: int | None
    step: tuple[int, ...] | None
    matrix: Matrix

    @property
    def place(self) -> str:
        """``3.2`` is layer 3, step 2; ``3.all`` are its steps together, ``all`` all layers."""
        steps = ["all"] if self.step is None else [str(number) for number in self.step]
        return "all" if self.layer is None else ".".join([str(self.layer), *steps])

    def order(self) -> tuple[float, bool, tuple[int, ...], int]:
        """A key to sort by: layers, the steps of each, then all its steps; last all layers."""
        layer = math.inf if self.layer is None else self.layer
        return layer, self.step is None, self.step or (), get_args(Matrix).index(self.matrix)


@dataclass(frozen=True)
class Product:
    """What a use computed: outputs ``y_BKO`` from inputs ``x_BKI`` by ``linear``."""

    linear: nn.Linear
    x_BKI: Tensor
    y_BKO: Tensor


@dataclass(frozen=True)
class Norms:
    """Norms of the gradients of J losses of each window.

    ``nuclear``: of each use, [J, B]. ``at_logits_JB``: the Frobenius norm of the gradient of the
    loss at the logits [T, V] of the window.
    """

    nuclear: dict[Use, Tensor]
    at_logits_JB: Tensor


def attentions(model: LanguageModel) -> dict[Attention, int]:
    """The attention blocks of a model with their numbers, see `Use`.

    Raises ArchdslError if there are none.
    """
    names = {
        module: re.sub(r"\.bodies\.\d+", ".bodies", name)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }
    if not names:
        raise ArchdslError(f"{model.spec.name} has no attention, whose gradients could be measured")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
    return {module: numbers[name] for module, name in names.items()}


class _Recorder:
    """Notes the uses of the matrices of one attention block; its methods are hooks of modules."""

    def __init__(self, uses: dict[Use, Product], layer: int) -> None:
        self.uses, self.layer = uses, layer
        self.step: tuple[int, ...] = ()

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the block runs: its arguments are the stream and the context of the pass."""
        self.step = tuple(number + 1 for number in args[1].path)

    def note(self, matrix: Matrix, linear: nn.Linear, args: tuple[Tensor], y_BKO: Tensor) -> None:
        """After a matrix was used."""
        if not y_BKO.requires_grad:  # all weights before it are frozen
            y_BKO.requires_grad_()
        self.uses[Use(self.layer, self.step, matrix)] = Product(linear, args[0].detach(), y_BKO)


@contextmanager
def recorded(model: LanguageModel) -> Iterator[dict[Use, Product]]:
    """Within the block, a pass of the model fills the mapping with its uses.

    Raises ArchdslError if the model has no attention.
    """
    uses: dict[Use, Product] = {}
    handles = []
    for attention, layer in attentions(model).items():
        recorder = _Recorder(uses, layer)
        handles.append(attention.register_forward_pre_hook(recorder.enter))
        for matrix in MATRICES:
            hook = partial(recorder.note, matrix)
            handles.append(getattr(attention, matrix).register_forward_hook(hook))
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def window_norms(model: LanguageModel, batch: Batch, weight_JBT: Tensor) -> Norms:
    """The norms of the gradients of J weighted sums of the token losses of each window.

    ``weight_JBT``: the weight of each token in each sum. One forward pass, and a backward pass for
    each of the J. Windows must not influence each other, which holds in evaluation mode.
    """
    device = next(model.parameters()).device
    with recorded(model) as uses:
        logits_BTV = model(batch.tokens_BT.to(device))
    loss_BT = cross_entropy(logits_BTV, batch.targets_BT.to(device))
    outputs = [logits_BTV, *(product.y_BKO for product in uses.values())]
    nuclear: dict[Use, list[Tensor]] = {}
    at_logits = []
    for weight_BT in weight_JBT.to(loss_BT):
        loss = (loss_BT * weight_BT).sum()
        slope_BTV, *slopes = torch.autograd.grad(
            loss, outputs, retain_graph=True, allow_unused=True
        )
        at_logits.append(torch.linalg.vector_norm(slope_BTV, dim=(1, 2)).cpu())
        found = _with_slopes(uses, slopes)
        for use, (x_BKI, slope_BKO) in (found | _over_steps(uses, found)).items():
            nuclear.setdefault(use, []).append(nuclear_norm(x_BKI, slope_BKO).cpu())
    return Norms(
        {use: torch.stack(norm_JB) for use, norm_JB in nuclear.items()}, torch.stack(at_logits)
    )


Pair = tuple[Tensor, Tensor]  # the inputs of a use, and the gradient at its outputs


def _with_slopes(uses: Mapping[Use, Product], slopes: Sequence[Tensor | None]) -> dict[Use, Pair]:
    """The inputs and slopes of each use; a slope is zero where the loss does not depend on it."""
    return {
        use: (product.x_BKI, torch.zeros_like(product.y_BKO) if slope is None else slope)
        for (use, product), slope in zip(uses.items(), slopes, strict=True)
    }


def _over_steps(uses: Mapping[Use, Product], found: Mapping[Use, Pair]) -> dict[Use, Pair]:
    """The inputs and slopes of weights that are used several times, all uses together."""
    by_weight: dict[nn.Linear, list[Use]] = {}
    for use, product in uses.items():
        by_weight.setdefault(product.linear, []).append(use)
    together = {}
    for several in by_weight.values():
        if len(several) > 1:
            xs, slopes = zip(*(found[use] for use in several), strict=True)
            together[several[0]._replace(step=None)] = torch.cat(xs, 1), torch.cat(slopes, 1)
    return together


def weight_gradient(x_BKI: Tensor, slope_BKO: Tensor) -> Tensor:
    """The gradient of the weight through one use, for each window, [B, O, I]."""
    return slope_BKO.mT @ x_BKI


def nuclear_norm(x_BKI: Tensor, slope_BKO: Tensor) -> Tensor:
    """The nuclear norm of `weight_gradient`, the sum of its singular values, [B].

    In float32 at least. The time is that of singular values of [O, I] matrices, which grows with
    O * I * min(O, I). With K tokens, fewer than both, it is that of [K, K] matrices: with the
    factorisations x^T = Q R and slope^T = P S, the gradient is P (S R^T) Q^T, and the columns of P
    and Q are orthonormal.
    """
    exact = torch.promote_types(x_BKI.dtype, torch.float32)
    x_BKI, slope_BKO = x_BKI.to(exact), slope_BKO.to(exact)
    if x_BKI.size(1) < min(x_BKI.size(2), slope_BKO.size(2)):
        R_BKK = torch.linalg.qr(x_BKI.mT, mode="r").R
        S_BKK = torch.linalg.qr(slope_BKO.mT, mode="r").R
        return torch.linalg.svdvals(S_BKK @ R_BKK.mT).sum(-1)
    return torch.linalg.svdvals(weight_gradient(x_BKI, slope_BKO)).sum(-1)
