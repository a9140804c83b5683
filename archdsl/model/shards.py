"""Tensors in a folder of safetensors files, of which each process wrote the parts that it holds.

They are written and read by torch.distributed.checkpoint (DCP), by any number of processes and in
any division among them. Each file says where its parts belong, so nothing is stored by pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> Future[Any]:
    """Copy the parts of this process to memory, and write them to ``folder`` in the background.

    All processes call this together. ``group``: those processes, connected by gloo.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return async_save(dict(tensors), storage_writer=writer, process_group=group)  # type: ignore[return-value]


def read_shards(tensors: Mapping[str, Tensor], folder: Path, together: bool) -> None:
    """Fill ``tensors``, each of which may be divided among processes, from the files of a folder.

    ``together``: whether several processes call this. The folder may also hold whole tensors.
    Raises ValueError, which names the tensor, if one is missing or incomplete, or differs in shape
    or type.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = _stored(folder)
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{name} is missing")
        _compare(name, stored[name], tensor)
    with _quiet():
        load(dict(tensors), storage_reader=_reader(folder), no_dist=not together)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """The names and the shapes of all tensors in the files of a folder."""
    return {name: list(found.size) for name, found in _stored(folder).items()}


def _stored(folder: Path) -> dict[str, Any]:
    return dict(_reader(folder).read_metadata().state_dict_metadata)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def _compare(name: str, stored: Any, wanted: Tensor) -> None:
    if (size := list(stored.size)) != list(wanted.shape):
        raise ValueError(f"{name} has the shape {size}, and must have {list(wanted.shape)}")
    if (dtype := stored.properties.dtype) != wanted.dtype:
        raise ValueError(f"{name} is of type {dtype}, and must be of {wanted.dtype}")
    if sum(chunk.sizes.numel() for chunk in stored.chunks) != wanted.numel():
        raise ValueError(f"{name} is incomplete")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of DCP that it was called by one process alone, which is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
