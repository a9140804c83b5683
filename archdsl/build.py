"""Spec to model, without ever holding more than the weights once."""

from __future__ import annotations

import os

import torch

from archdsl import verbs
from archdsl.cost import sequence_cost
from archdsl.errors import ArchdslError
from archdsl.model import LanguageModel
from archdsl.spec import ModelSpec


class TooLargeError(ArchdslError):
    """The weights alone do not fit into this machine's memory."""


def build(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """An initialised model; equal seeds give equal bits. Raises TooLargeError before allocating.

    >>> import archdsl
    >>> model = archdsl.build(archdsl.load("tiny"))
    >>> sum(p.numel() for p in model.parameters()) == archdsl.cost(model.spec).params
    True
    """
    _refuse_what_cannot_fit(spec, dtype)
    model = meta_model(spec)
    model.to(dtype).to_empty(device="cpu")
    if spec.tie_embeddings:
        model.head.weight = model.embedding.weight  # to_empty makes two of one
    with torch.no_grad():
        model.initialise(seed)
    return model.to(device)


def meta_model(spec: ModelSpec) -> LanguageModel:
    """Shapes without data: for counting, and for loading weights into."""
    with torch.device("meta"):
        return LanguageModel(spec)


def _refuse_what_cannot_fit(spec: ModelSpec, dtype: torch.dtype) -> None:
    need = sequence_cost(spec, tokens=1).params * dtype.itemsize
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise TooLargeError(
            f"{spec.name}: the weights need {need / 2**30:,.1f} GiB and this machine has "
            f"{have / 2**30:,.1f} GiB; `archdsl build` without --out costs it without building it"
        )


verbs.callable_by_name(__name__)
