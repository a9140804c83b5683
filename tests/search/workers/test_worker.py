"""Errors of a worker: which of them mean that memory was short."""

from __future__ import annotations

import pytest

from archdsl.search.workers.worker import failure

ALLOCATORS = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda error: type(error).__name__)
def test_errors_of_allocators_are_out_of_memory(error: BaseException) -> None:
    assert failure(error).reason == "out of memory"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory")])
def test_other_errors_are_not(error: BaseException) -> None:
    assert failure(error).reason == "error"
