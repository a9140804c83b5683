"""Builds the torch model of a spec, without more memory than its weights need."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from archdsl.costs.receipt import sequence_cost
from archdsl.errors import ArchdslError
from archdsl.lang.load import Source, as_spec
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel


class TooLargeError(ArchdslError):
    """The weights alone do not fit into this machine's memory."""


def build(
    spec: Source,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The model of a spec with initial weights. Equal seeds give equal bits.

    ``spec``: a spec, or anything that `archdsl.load` takes. Raises SpecError if it is wrong, and
    TooLargeError, before any memory is allocated, if the weights are larger than the memory
    of this machine.

    >>> import archdsl
    >>> model = archdsl.build("tiny")
    >>> sum(p.numel() for p in model.parameters()) == archdsl.cost(model.spec).params
    True
    """
    known = as_spec(spec)
    _refuse_what_cannot_fit(known, dtype)
    with torch.device("cpu"), _default_dtype(dtype), _Undrawn():
        model = LanguageModel(known)
    with torch.no_grad():
        model.initialise(seed)
    return model.to(device)


def require_model(found: object) -> None:
    """Raises ArchdslError for anything but a model, for functions that need weights."""
    if not isinstance(found, nn.Module):
        is_plain = found is None or isinstance(found, str | bytes | int | float | list | dict)
        shown = reprlib.repr(found) if is_plain else f"a {type(found).__name__}"
        raise ArchdslError(
            "a model is needed, which archdsl.build(SPEC) returns, or "
            f"load_checkpoint(FOLDER).model from archdsl.model.checkpoint; got {shown}"
        )


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
        if func in (nn.init.kaiming_uniform_, nn.init.normal_, torch.Tensor.normal_):
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
