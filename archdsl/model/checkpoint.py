"""A checkpoint: a folder with a model, and what is needed to use it or to continue its training.

    model.safetensors       the weights, shared ones once; or shard-*.safetensors, see `shards`
    spec.yaml               the model, as ``archdsl build`` takes it
    tokenizer.json          unless the data has none
    text_format.json        for imported models: which tokens end a text, and the chat template
    training.json, .safetensors     where training stood, if it is to go on; the tensors are among
                            the shards, if there are shards
    provenance.json         what made it, the plugins that define its kinds, and the SHA-256 of each
                            file above

No file of it can carry code. It is written whole or not at all.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from archdsl import __version__
from archdsl.data.text_format import TEXT_FORMAT
from archdsl.data.types import Data
from archdsl.errors import ArchdslError, Position, Problem, SpecError, describe
from archdsl.files import (
    MISSING,
    WriteError,
    atomic_folder,
    read_json,
    refuse_no_file,
    why_unreadable,
)
from archdsl.lang.registry import how_to_load, modules_of, plugin_modules
from archdsl.lang.source import read, shipped_specs
from archdsl.lang.spec import ModelSpec, parse_spec, walk
from archdsl.model.build import build, meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.model.shards import read_shards, stored_shapes
from archdsl.nn.ranks import local

FORMAT = 1
WEIGHTS, SPEC, TOKENIZER, PROVENANCE = (
    "model.safetensors",
    "spec.yaml",
    "tokenizer.json",
    "provenance.json",
)
SHARDS = "shard-*.safetensors"
TENSORS, TRAINING = "training.safetensors", "training.json"

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # that weights may have

MODULE = re.compile(r"[A-Za-z_]\w{0,99}(\.\w{1,99}){0,9}", re.ASCII)  # the name of a plugin

State = Mapping[str, Any]  # tensors, and whatever JSON can hold


class CheckpointError(ArchdslError):
    """A checkpoint that cannot be written, or a folder that is not a valid checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read, and the model that it holds."""

    path: Path
    model: LanguageModel
    provenance: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model."""
        return self.model.spec

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file; None for data that is not text."""
        path = self.path / TOKENIZER
        return path if path.exists() else None

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the file of weights, or of those of all shards."""
        digests = [self.provenance["files"][name] for name in _weight_files(self.provenance)]
        return digests[0] if len(digests) == 1 else _sha256_of("\n".join(digests).encode())

    @property
    def new_parameters(self) -> frozenset[str]:
        """The names of the parameters that ``archdsl retrofit`` added.

        Raises CheckpointError if the model does not have them.
        """
        retrofit = self.provenance.get("retrofit", {})
        names = retrofit.get("new", []) if isinstance(retrofit, dict) else None
        known = dict(self.model.named_parameters())
        if not isinstance(names, list) or not all(str(name) in known for name in names):
            raise CheckpointError(
                f"{self.path / PROVENANCE} does not name its new parameters as the model does"
            )
        return frozenset(map(str, names))


def save_checkpoint(
    path: str | os.PathLike[str],
    model: LanguageModel,
    *,
    tokenizer_from: Data | Path | None,
    provenance: Mapping[str, Any],
    training: State | None = None,
    durable: bool = True,
    shards: Path | None = None,
) -> None:
    """Writes the folder ``path``, in place of an older checkpoint of that name.

    ``tokenizer_from``: data, or a tokenizer.json with its text format. ``training`` maps names to
    tensors or JSON values. ``shards``: a folder with all tensors, which is moved. Not ``durable``:
    a kill harms nothing, but after a power failure it may be damaged, as whoever loads it is then
    told. Raises CheckpointError if the folder holds something else, or if it cannot be written.
    """
    path = Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not (path / PROVENANCE).is_file():
        raise CheckpointError(f"{path} exists and is no checkpoint; it is left as it is")
    try:
        with atomic_folder(path, durable=durable) as folder:
            if shards is None:
                _write_weights(folder, model)
            else:
                _move_shards(shards, folder)
            _write(folder, model.spec, tokenizer_from, training, tensors=shards is None)
            about = _about(folder, model.spec) | dict(provenance)
            _write_json(folder / PROVENANCE, about)
    except WriteError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def _move_shards(shards: Path, folder: Path) -> None:
    for file in shards.iterdir():
        file.rename(folder / file.name)
    shards.rmdir()


def _write_weights(folder: Path, model: LanguageModel) -> None:
    for parameter in model.parameters():  # `for_decoding` stores them in another way
        alone = parameter.untyped_storage().nbytes() == parameter.nbytes
        parameter.data = parameter.data.contiguous() if alone else parameter.data.clone()
    save_model(model, str(folder / WEIGHTS))


def _write(
    folder: Path,
    spec: ModelSpec,
    tokenizer: Data | Path | None,
    training: State | None,
    tensors: bool,
) -> None:
    (folder / SPEC).write_text(spec.to_yaml(), encoding="utf-8")
    if isinstance(tokenizer, Path):
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        if (beside := tokenizer.with_name(TEXT_FORMAT)).exists():
            shutil.copyfile(beside, folder / TEXT_FORMAT)
    elif tokenizer is not None:
        tokenizer.save_tokenizer(folder / TOKENIZER)
    if training is not None:
        found = {key: value for key, value in training.items() if isinstance(value, Tensor)}
        if tensors:
            save_file(found, folder / TENSORS)
        told = {key: value for key, value in training.items() if key not in found}
        _write_json(folder / TRAINING, told, indent=None)  # ten times as fast, and often written


def _write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _about(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    plugins = modules_of(type(part) for _, part in walk(spec))
    return {
        "format": FORMAT,
        "archdsl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": spec.fingerprint(),
        **({"plugins": plugins} if plugins else {}),
        "files": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weight_files(provenance: Mapping[str, Any]) -> list[str]:
    """The names of the files of weights in a checkpoint; none if it is no valid one."""
    recorded = provenance.get("files")
    if not isinstance(recorded, dict):
        return []
    return [WEIGHTS] if WEIGHTS in recorded else sorted(fnmatch.filter(recorded, SHARDS))


def load_checkpoint(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Reads the model of the folder, ready to use.

    Raises CheckpointError if the folder is no valid checkpoint, SpecError if its spec is wrong.
    """
    path = Path(path)
    provenance = _verified(path, WEIGHTS, SPEC, TOKENIZER, TEXT_FORMAT)
    spec = _spec(path, provenance)
    # on the device meta first, so that a spec of another size costs no memory
    _check_tensors(path, meta_model(spec))
    model = build(spec, device=device)
    _fill(path, model)
    return Checkpoint(path, model, provenance)


def _spec(path: Path, provenance: Mapping[str, Any]) -> ModelSpec:
    """The spec in a checkpoint. If kinds of it are unknown, the error says which plugin has them.

    A plugin that the checkpoint names is told to the user, who may trust it; it is never imported.
    """
    try:
        return parse_spec(read(path / SPEC))
    except SpecError as error:
        if not any("unknown kind" in problem.message for problem in error.problems):
            raise
        place = Position(str(path / PROVENANCE), 0, 0)
        advice = Problem("", _how_to_know(provenance.get("plugins")), place)
        raise SpecError([*error.problems, advice]) from None


def _how_to_know(named: object) -> str:
    """What to do about unknown kinds. ``named``: the plugins that a checkpoint claims to need."""
    modules = [str(one) for one in named] if isinstance(named, list) else []
    loaded = plugin_modules()
    missing = [one for one in modules if MODULE.fullmatch(one) and one not in loaded][:10]
    if not missing:
        return f"the model has kinds that are not part of archdsl; {how_to_load()}"
    return (
        f"the model has kinds of {', '.join(missing)}: if you trust that code, install its "
        f"package, or name the module, as in --plugin {missing[0]}"
    )


def load_weights(path: Path, model: LanguageModel) -> None:
    """Replaces the weights of ``model``. Raises CheckpointError if they do not fit."""
    _verified(path, WEIGHTS)
    _check_tensors(path, model)
    _fill(path, model)


def _fill(path: Path, model: LanguageModel) -> None:
    if (path / WEIGHTS).exists():
        load_model(model, path / WEIGHTS, device=str(next(model.parameters()).device))
    else:
        read_tensors(path, stored_state(path, model), together=False)
        check_weights(path, model.state_dict(), model)


def one_of_each(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors of a model, shared ones once."""
    state = model.state_dict()
    return {names[0]: state[names[0]] for names in _aliases(model)}


def stored_state(path: Path, model: LanguageModel) -> dict[str, Tensor]:
    """The tensors of a model by the names that a checkpoint has stored them under."""
    stored, state = _shapes_of_weights(path), model.state_dict()
    names = [next((one for one in each if one in stored), each[0]) for each in _aliases(model)]
    return {name: state[name] for name in names}


def _shapes_of_weights(path: Path) -> dict[str, list[int]]:
    """The shape of each stored weight. Only the state of training has names with a slash."""
    with _refusing_nonsense(path):
        return {name: shape for name, shape in stored_shapes(path).items() if "/" not in name}


def read_tensors(path: Path, tensors: Mapping[str, Tensor], together: bool) -> None:
    """Fills tensors, also divided ones, from a checkpoint of whole or of divided tensors.

    ``together``: whether several processes do so. Raises CheckpointError if one is missing or does
    not fit.
    """
    with _refusing_nonsense(path):
        try:
            read_shards(tensors, path, together)
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit: {error}") from None


def load_training(path: Path, tensors: bool = True) -> dict[str, Any]:
    """Reads the state of training that was saved, without tensors that are among the shards.

    Not ``tensors``: without any. Raises CheckpointError if there is no state, or it is damaged.
    """
    provenance = _verified(path, TRAINING, *([TENSORS] if tensors else []))
    if not (path / TRAINING).exists():
        raise CheckpointError(f"{path} holds a model, but not where its training stood")
    told = read_json(path / TRAINING, CheckpointError)
    if not tensors or _weight_files(provenance) != [WEIGHTS]:
        return told
    if not (path / TENSORS).exists():
        raise CheckpointError(f"{path / TENSORS} is missing, which belongs to {TRAINING}")
    with _refusing_nonsense(path / TENSORS):
        return told | load_file(path / TENSORS)


def _verified(path: Path, *names: str) -> dict[str, Any]:
    """The provenance, once the named files are known to be as they were written."""
    refuse_no_file(path / PROVENANCE, CheckpointError)
    if not (path / PROVENANCE).is_file():
        raise CheckpointError(_not_one(path))
    provenance = read_json(path / PROVENANCE, CheckpointError)
    if provenance.get("format") != FORMAT:
        found = provenance.get("format")
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}; this version reads {FORMAT}"
        )
    weights, recorded = _weight_files(provenance), provenance.get("files", {})
    if not weights or SPEC not in recorded:
        raise CheckpointError(f"{path / PROVENANCE} does not say which files belong to it")
    if WEIGHTS in names:
        names += (*weights, *(file.name for file in path.glob(SHARDS)))
    for name in dict.fromkeys(names):
        file, wanted = path / name, recorded.get(name)
        if wanted is not None and (why := why_unreadable(file)):
            raise CheckpointError(f"{file} {'is missing' if why == MISSING else why}")
        if wanted is None and file.exists():
            raise CheckpointError(f"{file} does not belong to this checkpoint")
        if wanted is not None and _sha256(file) != wanted:
            raise CheckpointError(
                f"{file} was altered or cut short: its SHA-256 is not the one in {PROVENANCE}"
            )
    _check_shape(path / PROVENANCE, provenance)
    return provenance


def _check_shape(file: Path, provenance: Mapping[str, Any]) -> None:
    """Refuses a provenance in which something that is read from it is of another type."""
    data = provenance.get("data", {})
    wanted = {"data": dict, "retrofit": dict, "step": int, "seed": int}
    found = [(key, provenance[key], kind) for key, kind in wanted.items() if key in provenance]
    if isinstance(data, dict):
        found += [(f"data.{key}", value, str) for key, value in data.items()]
    for key, value, kind in found:
        if not isinstance(value, kind) or isinstance(value, bool):
            what = {dict: "a mapping", int: "a whole number", str: "text"}[kind]
            raise CheckpointError(f"{file}: {key}: must be {what}, got {describe(value)}")


def _not_one(path: Path) -> str:
    if (path.is_file() and path.suffix == ".yaml") or str(path) in shipped_specs():
        return f"{path} is a spec and no checkpoint: `archdsl train {path}` makes one of it"
    if not path.exists():
        return f"there is no checkpoint at {path}"
    inside = [found.parent for found in sorted(path.glob(f"*/{PROVENANCE}"))]
    inside += [found.parent for found in sorted(path.glob(f"checkpoints/*/{PROVENANCE}"))]
    hint = f"; did you mean {inside[0]}?" if inside else ""
    return f"{path} is no checkpoint: it has no {PROVENANCE}{hint}"


@contextmanager
def _refusing_nonsense(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None


def _check_tensors(path: Path, model: LanguageModel) -> None:
    """Compares the stored tensors with those of the model, in names, shapes, types and values."""
    file = path / WEIGHTS
    if not file.exists():
        _check_names_and_shapes(path, _shapes_of_weights(path), model)
        return
    wanted = model.state_dict()
    with _refusing_nonsense(file), safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        shapes = {name: list(stored.get_slice(name).get_shape()) for name in names}
        _check_names_and_shapes(file, shapes, model)
        buffers = {name for name, _ in model.named_buffers()}
        for name in sorted(names):
            _check_values(file, name, stored.get_tensor(name), wanted[name], name in buffers)


def _check_names_and_shapes(
    file: Path, stored: Mapping[str, list[int]], model: LanguageModel
) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if name in stored and stored[name] != shape:
            raise CheckpointError(
                f"{file} does not fit the spec: {name} is {stored[name]}, the spec makes it {shape}"
            )
    unexpected = sorted(stored.keys() - wanted.keys())
    missing = [names[0] for names in _aliases(model) if not stored.keys() & set(names)]
    if unexpected or missing:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unexpected"
        raise CheckpointError(f"{file} does not fit the spec: {what}")


def check_weights(path: Path, tensors: Mapping[str, Tensor], model: LanguageModel) -> None:
    """Raises CheckpointError if a weight of a checkpoint, or this process's part, is not finite."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in tensors.items():
        own = local(tensor)
        _check_values(path, name, own, own, name in buffers)


def _check_values(file: Path, name: str, found: Tensor, wanted: Tensor, is_buffer: bool) -> None:
    """Refuses what would be cast to other values, and what no training can have left."""
    among = FLOATS if wanted.dtype in FLOATS else {wanted.dtype}
    if found.dtype not in among:
        words = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in among))
        what = f"is of type {str(found.dtype).removeprefix('torch.')}, and must be of {words}"
    elif found.isnan().any() or not (is_buffer or found.isfinite().all()):  # -inf may mask
        what = "has values that are not finite"
    else:
        return
    raise CheckpointError(f"{file}: {name} {what}")


def _aliases(model: LanguageModel) -> list[list[str]]:
    """The names of each tensor; shared ones have several, and are stored under one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())
