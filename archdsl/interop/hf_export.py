"""A checkpoint as a folder that transformers loads, with archdsl or without it.

    config.json             the spec, and the sizes that tools look for
    model.safetensors       the weights, shared ones once
    modeling_archdsl.py     this project's source, as far as the model needs it; the same for all
    generation_config.json, tokenizer.json, tokenizer_config.json

It is written whole or not at all, and only once it has been loaded by its own code.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from archdsl import __version__
from archdsl.data.text_format import TextFormat, text_format_of
from archdsl.data.tokenizers import ends_of, read_tokenizer
from archdsl.errors import ArchdslError
from archdsl.files import atomic_folder
from archdsl.interop.hf_model import CLASSES, ArchdslCache, ArchdslConfig, ArchdslForCausalLM
from archdsl.interop.source_bundle import bundle
from archdsl.lang.registry import families
from archdsl.lang.spec import ModelSpec, Part, walk
from archdsl.lang.strict import Strict
from archdsl.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from archdsl.model.language_model import LanguageModel

CODE = "modeling_archdsl"
TOLERANCE = 1e-5  # of logits, where the largest is one
HEADER = f'''"""A language model that thinks with dynamic depth, as transformers loads it.

Made by archdsl {__version__} from its own source: nothing in it comes from the model's author.
The architecture stands in config.json, under `spec`. Licence: Apache-2.0.
"""'''


class ExportError(ArchdslError):
    """A folder that cannot be written, or whose model is another than the checkpoint's."""


@dataclass(frozen=True)
class Exported:
    """``difference``: the largest of the logits, between the checkpoint and what was written."""

    path: Path
    difference: float
    tokens: int  # that were compared
    bytes: int


def export(checkpoint: Checkpoint, path: Path) -> Exported:
    """Writes the folder ``path``, in place of an older export. Raises ExportError."""
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not _is_export(path):
        raise ExportError(f"{path} exists and is no export; it is left as it is")
    try:
        with _silent(), atomic_folder(path) as folder:
            _write(folder, checkpoint)
            difference, tokens = _compare(folder, checkpoint.model)
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error}") from error
    return Exported(path, difference, tokens, sum(file.stat().st_size for file in path.iterdir()))


def _is_export(path: Path) -> bool:
    return (path / f"{CODE}.py").is_file() and (path / "config.json").is_file()


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    hub = in_transformers(checkpoint.model)
    hub.generation_config = GenerationConfig(use_cache=True)
    hub.save_pretrained(folder)  # with the code
    if checkpoint.tokenizer is not None:
        tokenizer = read_tokenizer(checkpoint.tokenizer)
        _write_tokenizer(folder, tokenizer, checkpoint.spec.context)
        _write_generation(folder, tokenizer)


def write_code(folder: Path, spec: ModelSpec) -> None:
    """Writes the source that loads a model of this spec without archdsl."""
    used = sorted({_package(type(part)) for _, part in walk(spec)} - {"archdsl"})
    (folder / f"{CODE}.py").write_text(code(*used), encoding="utf-8")


def code(*plugins: str) -> str:
    """The source of config, cache and model for those who have transformers and no archdsl.

    ``plugins``: the packages whose blocks the model has. The text depends on them and on the
    source alone, not on the spec.
    """
    known = [kind for family in families().values() for kind in family.values()]
    return _code(plugins, tuple(kind for kind in known if _package(kind) in {"archdsl", *plugins}))


@cache
def _code(plugins: tuple[str, ...], kinds: tuple[type[Part], ...]) -> str:
    header = HEADER
    if plugins:
        origin = f"Its blocks are also those of {', '.join(plugins)}, whose licences apply to them."
        header = HEADER.removesuffix('"""') + f'{origin}\n"""'
    return bundle([*CLASSES.values(), ArchdslCache, *kinds], header)


def _package(kind: type[Part]) -> str:
    return kind.__module__.partition(".")[0]


def in_transformers(model: LanguageModel) -> ArchdslForCausalLM:
    """The same model, no copy of it."""
    with torch.device("meta"):
        hub = ArchdslForCausalLM(config_of(model))
    hub.model.embedding, hub.model.blocks, hub.model.norm = (
        model.embedding,
        model.blocks,
        model.norm,
    )
    hub.model.find_parts()
    hub.lm_head = model.head
    return hub


def config_of(model: LanguageModel) -> ArchdslConfig:
    """The config of transformers for a model: its spec, and the classes that load it."""
    return ArchdslConfig(
        plain(model.spec),
        archdsl_version=__version__,
        auto_map={auto: f"{CODE}.{cls.__name__}" for auto, cls in CLASSES.items()},
    )


def plain(value: Any) -> Any:
    """A spec as JSON has it, with every default; what may differ by step is a list."""
    match value:
        case Strict():
            return {name: plain(getattr(value, name)) for name in type(value).model_fields}
        case tuple():
            return [plain(item) for item in value]
        case _:
            return value


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes the tokenizer with the special tokens and the chat template of its model."""
    text_format = text_format_of(tokenizer) or TextFormat()
    added = tokenizer.get_added_tokens_decoder()
    words = [added[end].content for end in ends_of(tokenizer) if end in added][:1]
    tokenizer.encode_special_tokens = False  # as transformers' tokenizers have it
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict.fromkeys(("eos_token", "pad_token") if words else (), *words)
        | text_format.special_tokens,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=text_format.chat_template,
    ).save_pretrained(folder)


def _write_generation(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes generation_config.json: every token that ends a text, and the settings of sampling.

    It is not left to transformers, which refuses to save some settings that it loads.
    """
    ends = ends_of(tokenizer)
    fields: dict[str, Any] = {"use_cache": True}
    if ends:
        fields |= {"eos_token_id": list(ends) if len(ends) > 1 else ends[0]}
        fields |= {"pad_token_id": ends[0]}
    if text_format := text_format_of(tokenizer):
        fields |= text_format.generation
    try:
        GenerationConfig(**fields).to_json_file(folder / "generation_config.json")
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ExportError(f"the settings of generation of the imported model: {reason}") from None


def _compare(folder: Path, model: LanguageModel) -> tuple[float, int]:
    """The largest difference of logits, once the folder is loaded by its own code.

    Both route causally, as an exported model does outside of training.
    """
    weight = model.head.weight
    shape = (2, min(model.spec.context, 128))
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.spec.vocab_size, shape, generator=generator).to(weight.device)
    with torch.no_grad(), _evaluating(model):
        with model.causal_routing():
            wanted = model(tokens_BT)
        try:
            with loaded(folder) as hub:
                found = hub.to(weight.device)(tokens_BT).logits
        except (NameError, AttributeError) as error:  # what a block uses and the file has not
            raise ExportError(
                f"the exported model does not run by its own code: {error}; nothing was written"
            ) from error
    difference = (wanted - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise ExportError(
            f"the exported model's logits differ by {difference:.2g}; nothing was written"
        )
    return difference, tokens_BT.numel()


@contextmanager
def loaded(folder: Path) -> Iterator[Any]:
    """The exported model by its own code, which is there as long as the model is in use."""
    with _module(folder / f"{CODE}.py") as module, _silent():
        yield module.ArchdslForCausalLM.from_pretrained(folder)


class _Loader(importlib.machinery.SourceFileLoader):
    def set_data(self, path: str, data: Any, *, _mode: int = 0) -> None:
        """Leaves no bytecode in the folder."""


@contextmanager
def _module(path: Path) -> Iterator[ModuleType]:
    """A file as a module that nobody else can import."""
    name = f"{CODE} of {path.parent}"
    found = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    assert found is not None
    assert found.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
