"""Import pretrained weights from a transformers folder or a GGUF file into a checkpoint.

The folder may also be one that `archdsl export` wrote, whoever has trained it since. Weights are
read from safetensors and GGUF files alone, which cannot contain code; code in a folder is not run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from archdsl.data.folders import few
from archdsl.data.text_format import TOKENIZER, TextFormat
from archdsl.data.tokenizers import ends_of, read_tokenizer, vocab_size
from archdsl.files import read_json
from archdsl.interop.gguf import GgufFile
from archdsl.interop.llama_config import (
    PretrainedError,
    llama_spec,
    own_spec,
    transformers_name,
    unused_fields,
)
from archdsl.interop.model_text import text_format_in
from archdsl.interop.stored import Stored
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.checkpoint import save_checkpoint
from archdsl.model.language_model import LanguageModel

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FLOATS = ("F32", "F16", "BF16")  # all of their values are exact in float32
OTHERS = {"BOOL": torch.bool, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in files from 2023
OWN = "archdsl"  # the model type of what `archdsl export` writes
HEAD = "lm_head.weight"


class PretrainedSource(Protocol):
    """A pretrained model on disk, with the names that transformers uses.

    ``files``: the files that were read. ``config_file``: the one with the config.
    """

    files: list[Path]
    config_file: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of a config.json."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """What is known of each weight before it is read."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the weights."""

    def tokenizer(self, scratch: Path, vocab_size: int) -> Path | None:
        """Write tokenizer.json and text_format.json to the folder ``scratch``.

        ``vocab_size``: of the model. Return the path of tokenizer.json; None if there is none.
        """


@dataclass(frozen=True)
class ImportedModel:
    """The result of an import.

    ``architecture``: the model type in the config. ``tokens``: the size of the tokenizer's
    vocabulary; 0 without one. ``files``: the SHA-256 of each file that was read, by name.
    ``notes``: what the files say and archdsl does not use.
    """

    spec: ModelSpec
    architecture: str
    tokens: int
    files: dict[str, str]
    notes: tuple[str, ...] = ()


def import_pretrained(
    path: Path, out: Path, *, name: str | None = None, context: int | None = None
) -> ImportedModel:
    """Write the model in ``path`` as a checkpoint to the folder ``out``, in float32.

    ``path``: a folder with config.json, model.safetensors (or shards and their index) and
    tokenizer.json, or a .gguf file. ``name``: the name of the spec; default: that of ``path``, or
    the own name of a model that archdsl has exported. ``context``: tokens; at most the model's
    own, which is the default.

    Raises PretrainedError if the files are damaged or archdsl cannot express the model, SpecError
    if a size is out of bounds, and CheckpointError if ``out`` cannot be written.
    """
    source = _open(path)
    spec = _spec(source, path, name, context)
    with TemporaryDirectory() as scratch:
        names = _names(source, spec)
        _check_tensors(path, source.stored, spec, names)
        tokenizer = source.tokenizer(Path(scratch), spec.vocab_size)
        tokens = _count_tokens(tokenizer, path, spec) if tokenizer else 0
        files = {file.name: _sha256(file) for file in source.files}
        notes = tuple(_notes(source, tokenizer))
        imported = ImportedModel(spec, source.config["model_type"], tokens, files, notes)
        about = {"source": path.name, "architecture": imported.architecture, "files": files}
        save_checkpoint(
            out,
            _filled(spec, source, names),
            tokenizer_from=tokenizer,
            provenance={"step": 0, "imported": about},
        )
    return imported


def _open(path: Path) -> PretrainedSource:
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path)
    found = "is neither" if path.exists() else "does not exist"
    raise PretrainedError(f"{path} {found}: expected a folder with {CONFIG}, or a .gguf file")


def _spec(source: PretrainedSource, path: Path, name: str | None, context: int | None) -> ModelSpec:
    file = str(source.config_file)
    if source.config.get("model_type") == OWN:
        return own_spec(source.config, file, name=name, context=context)
    return llama_spec(source.config, file, name=name or _name(path), context=context)


def _names(source: PretrainedSource, spec: ModelSpec) -> dict[str, str]:
    """Return the stored name of each weight of the model, by its name in archdsl."""
    names = list(meta_model(spec).state_dict())
    if source.config["model_type"] != OWN:
        return {name: transformers_name(name) for name in names}
    head = HEAD if HEAD in source.stored else "model.head.weight"  # the latter in older exports
    return {name: head if name == "head.weight" else f"model.{name}" for name in names}


def _notes(source: PretrainedSource, tokenizer: Path | None) -> Iterator[str]:
    unused = unused_fields(source.config) if source.config["model_type"] != OWN else []
    if unused:
        yield f"{source.config_file} has fields that archdsl does not know: {few(unused)}"
    backend = read_tokenizer(tokenizer) if tokenizer else None
    special = backend.get_added_tokens_decoder() if backend else {}
    for end in ends_of(backend) if backend else ():
        if end not in special:
            yield (
                f"token {end}, which ends texts by eos_token_id, is an ordinary token of the "
                "tokenizer: it may also stand inside of a text"
            )


def _name(path: Path) -> str:
    stem = path.absolute().name.removesuffix(".gguf")
    return re.sub(r"[^\w.+-]+", "-", stem)[:100] or "imported"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tensors(
    path: Path, stored: Mapping[str, Stored], spec: ModelSpec, names: Mapping[str, str]
) -> None:
    model = meta_model(spec)
    for name, tensor in model.state_dict().items():
        if found := stored.get(names[name]):
            _check_tensor(names[name], found, tensor)
    wanted = set(names.values())
    tied = {names["head.weight"]} if spec.tie_embeddings else set()
    missing = sorted(wanted - stored.keys() - tied)
    extra = sorted(name for name in stored.keys() - wanted if not UNUSED.fullmatch(name))
    if missing or extra:
        place = path if missing else stored[extra[0]].file
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} is unexpected"
        raise PretrainedError(f"{place}: the weights do not fit the config: {what}")


def _check_tensor(name: str, found: Stored, wanted: Tensor) -> None:
    if found.shape != tuple(wanted.shape):
        raise PretrainedError(
            f"{found.file}: the weights do not fit the config: {name} has shape "
            f"{list(found.shape)}, but the config requires {list(wanted.shape)}"
        )
    floats = wanted.dtype.is_floating_point
    if found.dtype not in FLOATS if floats else OTHERS.get(found.dtype) != wanted.dtype:
        expected = ", ".join(FLOATS) if floats else str(wanted.dtype).removeprefix("torch.")
        raise PretrainedError(f"{found.file}: {name} is {found.dtype}, expected {expected}")


def _count_tokens(tokenizer: Path, path: Path, spec: ModelSpec) -> int:
    tokens = vocab_size(read_tokenizer(tokenizer))
    if tokens > spec.vocab_size:
        raise PretrainedError(
            f"{path}: the tokenizer has {tokens:,} tokens, but the model has only a "
            f"vocab_size of {spec.vocab_size:,}"
        )
    return tokens


def _filled(spec: ModelSpec, source: PretrainedSource, names: Mapping[str, str]) -> LanguageModel:
    model = meta_model(spec)
    ours = {stored: name for name, stored in names.items()}
    buffers = {name for name, _ in model.named_buffers()}
    state: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        if name in ours:
            _check_values(source.stored[name].file, name, tensor, ours[name] in buffers)
            state[ours[name]] = tensor.float() if tensor.is_floating_point() else tensor
    if spec.tie_embeddings:
        embedding = state["embedding.weight"]
        if not state.get("head.weight", embedding).equal(embedding):
            raise PretrainedError(
                f"{source.stored[names['head.weight']].file}: {names['head.weight']} and "
                f"{names['embedding.weight']} differ, but the config ties them: if both were "
                f"trained, set tie_word_embeddings to false in {source.config_file}"
            )
        state["head.weight"] = embedding  # some files contain it twice
    model.load_state_dict(state, assign=True)  # without a second copy in memory
    return model


def _check_values(file: Path, name: str, tensor: Tensor, is_buffer: bool) -> None:
    # A buffer may mask by infinite values.
    if tensor.isnan().any() or not (is_buffer or tensor.isfinite().all()):
        raise PretrainedError(f"{file}: {name} has values that are not finite")


class SafetensorsFolder:
    """A folder with config.json, tokenizer.json and safetensors, in one file or in shards.

    Raises PretrainedError if a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        if not self.config_file.exists() and (path / ADAPTER).exists():
            raise PretrainedError(
                f"{path} holds an adapter ({ADAPTER}), not a model: merge it into its model with "
                "merge_and_unload() of peft and save that"
            )
        self.config = read_json(self.config_file, PretrainedError)
        self.shards = self._shards(path / INDEX)
        self.stored: dict[str, Stored] = {}
        headers = {shard: self._read_header(shard) for shard in self.shards}
        for shard, names in self.shards.items():
            found = headers[shard]
            if odd := sorted(names ^ found.keys()) if names else None:
                raise PretrainedError(
                    f"{path / shard} and {INDEX} differ: only one of them has {odd[0]}"
                )
            self.stored |= found
        index = [path / INDEX] if any(self.shards.values()) else []
        self.files = [*index, self.config_file, *(path / shard for shard in self.shards)]

    def _shards(self, index: Path) -> dict[str, set[str]]:
        """Return the names that the index has for each file; no names for a file without one."""
        whole = (self.path / WEIGHTS).is_file()
        if not index.is_file():
            if whole:
                return {WEIGHTS: set()}
            raise PretrainedError(self._no_weights())
        indexed = self._indexed(index)
        if whole and WEIGHTS not in indexed:
            raise PretrainedError(
                f"{self.path} has both {WEIGHTS} and {INDEX}, which names other files: one of them "
                "is older and was left behind; remove it"
            )
        return indexed

    def _no_weights(self) -> str:
        wanted = f"neither {WEIGHTS} nor {INDEX}"
        pickles = sorted(self.path.glob("*.bin"))
        if not pickles:
            return f"{self.path} has {wanted}"
        return (
            f"{self.path} has {wanted}; {pickles[0].name} is a pickle, which can run any code and "
            "is not opened: save the model as safetensors first (safe_serialization=True)"
        )

    def _indexed(self, index: Path) -> dict[str, set[str]]:
        places = read_json(index, PretrainedError).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise PretrainedError(f"{index} has no weight_map")
        shards: dict[str, set[str]] = {}
        for name, shard in places.items():
            # Reject paths such as "../secret".
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise PretrainedError(f"{index}: {name} is in {shard!r:.60}, which is not a shard")
            shards.setdefault(shard, set()).add(name)
        return shards

    def _read_header(self, shard: str) -> dict[str, Stored]:
        path = self.path / shard
        with self._opened(shard) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }

    @contextmanager
    def _opened(self, shard: str) -> Iterator[Any]:
        path = self.path / shard
        if not path.is_file():
            raise PretrainedError(f"{path} is missing, but {INDEX} refers to it")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise PretrainedError(f"{path} is damaged: {error}") from None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the weights, one shard after the other."""
        for shard in self.shards:
            with self._opened(shard) as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)

    def tokenizer(self, scratch: Path, vocab_size: int) -> Path | None:
        """Copy the tokenizer.json in the folder, and write what else the folder says of it."""
        path = self.path / TOKENIZER
        if not path.is_file():
            if self.config["model_type"] == OWN:  # it may read tokens that are no text
                return None
            raise PretrainedError(
                f"{self.path} has no {TOKENIZER}; transformers writes one with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        backend = read_tokenizer(path, TextFormat())
        text_format, files = text_format_in(self.path, self.config, backend, vocab_size)
        text_format.write(scratch)
        self.files += [path, *files]
        return shutil.copyfile(path, scratch / TOKENIZER)
