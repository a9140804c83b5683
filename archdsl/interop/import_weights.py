"""Import pretrained weights from a transformers folder or a GGUF file into a checkpoint.

Weights are read from safetensors and GGUF files alone, which cannot contain code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from archdsl.data.tokenizers import read_tokenizer, vocab_size
from archdsl.files import read_json
from archdsl.interop.gguf import GgufFile
from archdsl.interop.llama_config import PretrainedError, llama_spec, transformers_name
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.checkpoint import save_checkpoint
from archdsl.model.language_model import LanguageModel

CONFIG, WEIGHTS, INDEX, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
)
FLOATS = ("F32", "F16", "BF16")  # all of their values are exact in float32
UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in files from 2023
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]  # the keys are the names in transformers


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
    def shapes(self) -> Shapes:
        """The shape of each weight."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the weights."""

    def tokenizer(self, scratch: Path) -> Path:
        """Return the path of a tokenizer.json, which may be written to the folder ``scratch``."""


@dataclass(frozen=True)
class ImportedModel:
    """The result of an import.

    ``architecture``: the model type in the config. ``tokens``: the size of the tokenizer's
    vocabulary. ``files``: the SHA-256 of each file that was read, by name.
    """

    spec: ModelSpec
    architecture: str
    tokens: int
    files: dict[str, str]


def import_pretrained(
    path: Path, out: Path, *, name: str | None = None, context: int | None = None
) -> ImportedModel:
    """Write the model in ``path`` as a checkpoint to the folder ``out``, in float32.

    ``path``: a folder with config.json, model.safetensors (or shards and their index) and
    tokenizer.json, or a .gguf file. ``name``: the name of the spec; default: that of ``path``.
    ``context``: tokens; at most the model's own, which is the default.

    Raises PretrainedError if the files are damaged or archdsl cannot express the model, SpecError
    if a size is out of bounds, and CheckpointError if ``out`` cannot be written.
    """
    source = _open(path)
    spec = llama_spec(
        source.config, str(source.config_file), name=name or _name(path), context=context
    )
    with TemporaryDirectory() as scratch:
        _check_shapes(path, source.shapes, spec)
        tokenizer = source.tokenizer(Path(scratch))
        tokens = _count_tokens(tokenizer, path, spec)
        files = {file.name: _sha256(file) for file in source.files}
        imported = ImportedModel(spec, source.config["model_type"], tokens, files)
        about = {"source": path.name, "architecture": imported.architecture, "files": files}
        save_checkpoint(
            out,
            _filled(spec, source, path),
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


def _name(path: Path) -> str:
    stem = path.absolute().name.removesuffix(".gguf")
    return re.sub(r"[^\w.+-]+", "-", stem)[:100] or "imported"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shapes(path: Path, stored: Shapes, spec: ModelSpec) -> None:
    wanted = {
        transformers_name(name): tuple(tensor.shape)
        for name, tensor in meta_model(spec).state_dict().items()
    }
    for name, shape in wanted.items():
        if name in stored and stored[name] != shape:
            found = f"{name} has shape {list(stored[name])}, but the config requires {list(shape)}"
            raise PretrainedError(f"{path}: the weights do not fit the config: {found}")
    missing = sorted(wanted.keys() - stored.keys() - ({HEAD} if spec.tie_embeddings else set()))
    extra = sorted(name for name in stored.keys() - wanted.keys() if not UNUSED.fullmatch(name))
    if missing or extra:
        found = f"{missing[0]} is missing" if missing else f"{extra[0]} is unexpected"
        raise PretrainedError(f"{path}: the weights do not fit the config: {found}")


def _count_tokens(tokenizer: Path, path: Path, spec: ModelSpec) -> int:
    tokens = vocab_size(read_tokenizer(tokenizer))
    if tokens > spec.vocab_size:
        raise PretrainedError(
            f"{path}: the tokenizer has {tokens:,} tokens, but the model has only a "
            f"vocab_size of {spec.vocab_size:,}"
        )
    return tokens


def _filled(spec: ModelSpec, source: PretrainedSource, path: Path) -> LanguageModel:
    model = meta_model(spec)
    ours = {transformers_name(name): name for name in model.state_dict()}
    state: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        if name in ours:
            state[ours[name]] = tensor.float()
            if not tensor.isfinite().all():
                raise PretrainedError(f"{path}: {name} has values that are not finite")
    if spec.tie_embeddings:
        embedding = state["embedding.weight"]
        if not state.get("head.weight", embedding).equal(embedding):
            raise PretrainedError(
                f"{path}: {HEAD} and {EMBEDDING} differ, but the config ties them"
            )
        state["head.weight"] = embedding  # some files contain it twice
    model.load_state_dict(state, assign=True)  # without a second copy in memory
    return model


class SafetensorsFolder:
    """A folder with config.json, tokenizer.json and safetensors, in one file or in shards.

    Raises PretrainedError if a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        self.config = read_json(self.config_file, PretrainedError)
        index = path / INDEX
        if (path / WEIGHTS).is_file():
            self.shards = {WEIGHTS: set(self._stored(WEIGHTS))}
            self.files = []
        elif index.is_file():
            self.shards = self._indexed(index)
            self.files = [index]
        else:
            raise PretrainedError(self._no_weights())
        stored = {name: self._stored(name) for name in self.shards}
        for shard, names in self.shards.items():
            if odd := sorted(names ^ stored[shard].keys()):
                raise PretrainedError(
                    f"{path / shard} and {INDEX} differ: only one of them has {odd[0]}"
                )
        self.shapes = {name: shape for found in stored.values() for name, shape in found.items()}
        self.files += [self.config_file, *(path / shard for shard in self.shards)]

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

    def _stored(self, shard: str) -> dict[str, tuple[int, ...]]:
        shapes = {}
        with self._opened(shard) as file:
            for name in file.keys():  # noqa: SIM118  it is not a mapping
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if part.get_dtype() not in FLOATS and not UNUSED.fullmatch(name):
                    found = f"{name} is {part.get_dtype()}, expected {', '.join(FLOATS)}"
                    raise PretrainedError(f"{self.path / shard}: {found}")
        return shapes

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
        for shard, names in self.shards.items():
            with self._opened(shard) as file:
                for name in sorted(names):
                    yield name, file.get_tensor(name)

    def tokenizer(self, scratch: Path) -> Path:
        """Return the path of the tokenizer.json in the folder."""
        path = self.path / TOKENIZER
        if not path.is_file():
            raise PretrainedError(
                f"{self.path} has no {TOKENIZER}; transformers writes one with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        self.files.append(path)
        return path
