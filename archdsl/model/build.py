"""Builds the torch model of a spec, without more memory than its weights need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from archdsl.costs.receipt import sequence_cost
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel


class TooLargeError(ArchdslError):
    """The weights alone do not fit into this machine's memory."""


def build(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The model of a spec with initial weights. Equal seeds give equal bits.

    Raises TooLargeError, before any memory is allocated, if the weights are larger than the memory
    of this machine.

    >>> import archdsl
    >>> model = archdsl.build(archdsl.load("tiny"))
    >>> sum(p.numel() for p in model.parameters()) == archdsl.cost(model.spec).params
    True
    """
    _refuse_what_cannot_fit(spec, dtype)
    with torch.device("cpu"), _default_dtype(dtype), _Undrawn():
        model = LanguageModel(spec)
    with torch.no_grad():
        model.initialise(seed)
    return model.to(device)


def meta_model(spec: ModelSpec) -> LanguageModel:
    """The model without data, on the device ``meta``: for counting, or to load weights into."""
    with torch.device("meta"), _Undrawn():
        return LanguageModel(spec)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Undrawn(TorchFunctionMode):
    """Within the block, torch draws no initial values for linear maps and embeddings.

    They are drawn from a seed later, or there is no data.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in (nn.init.kaiming_uniform_, torch.Tensor.normal_):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _refuse_what_cannot_fit(spec: ModelSpec, dtype: torch.dtype) -> None:
    need = sequence_cost(spec, tokens=1).params * dtype.itemsize
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise TooLargeError(
            f"{spec.name}: the weights need {need / 2**30:,.1f} GiB and this machine has "
            f"{have / 2**30:,.1f} GiB; `archdsl build` without --out costs it without building it"
        )
