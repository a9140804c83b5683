"""Read GGUF, the single-file format of llama.cpp, with the names that transformers uses.

The reader of transformers dequantises the weights and builds the tokenizer.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from archdsl.data.text_format import TOKENIZER
from archdsl.data.tokenizers import beginning_tokens
from archdsl.interop.llama_config import PretrainedError
from archdsl.interop.model_text import checked_template, text_format
from archdsl.interop.stored import Stored

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
WITHOUT_EFFECT = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "attention.causal": True,
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ADD_BOS, ADD_SPACE = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
PARTS = "split.count"
NUMBERS = {  # tokens of tokenizer.ggml; an eot or eom token ends a turn, and so a text
    "eos_token_id": ("eos_token_id", "eot_token_id", "eom_token_id"),
    "bos_token_id": ("bos_token_id",),
    "pad_token_id": ("padding_token_id",),
    "unk_token_id": ("unknown_token_id",),
}
TEXT_FIELDS = {"tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre"} | {
    *(ADD_BOS, ADD_SPACE),
    *(f"tokenizer.ggml.{key}" for keys in NUMBERS.values() for key in keys),
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How the kinds of llama.cpp (tokenizer.ggml.pre) split a text before its bytes are merged, as in
# its src/llama-vocab.cpp. Other kinds are refused.
GPT2 = (
    "gpt-2 phi-2 gigachat jina-es jina-de jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
    "exaone4 mpt olmo jais trillion granite-docling"
)
DIGIT_BY_DIGIT = "smollm starcoder refact command-r codeshell exaone minerva-7b"
LLAMA3 = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEX = {
    **dict.fromkeys([*LLAMA3.split(), "dbrx", "smaug-bpe"], LLAMA3_SPLIT),
    **dict.fromkeys(
        ["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"], LLAMA3_SPLIT.replace("{1,3}", "")
    ),
    "tekken": TEKKEN_SPLIT,
}
# Texts of these begin with a token unless the file says otherwise, and what is a token as a whole
# is not merged from its bytes.
BEGUN_AND_WHOLE = frozenset([*LLAMA3.split(), "tekken"])
NOT_FLOATS = {"I8", "I16", "I32", "I64", "F64"}  # types of tensors


class GgufFile:
    """The weights, config and tokenizer of a LLaMA model in one GGUF file.

    Raises PretrainedError if the file is damaged, or is a LLaMA model that archdsl cannot express.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.config_file = path
        self.files = [path]
        with _reading(path):
            from gguf import GGUFReader

            reader = GGUFReader(path)
            fields = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("tokenizer.") or name in TEXT_FIELDS
            }
            found = [
                (one.name, one.shape.tolist()[::-1], one.tensor_type) for one in reader.tensors
            ]
        self.text = {name: fields.pop(name) for name in TEXT_FIELDS if name in fields}
        self.stored = {
            _name(name): Stored(path, tuple(shape), kind.name if kind.name in NOT_FLOATS else "F32")
            for name, shape, kind in found
        }
        self.config = _config(path, fields, self.stored)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the weights, dequantised to float32."""
        import torch

        with _reading(self.path):
            from transformers import LlamaConfig, LlamaForCausalLM
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

            with torch.device("meta"):
                names = LlamaForCausalLM(LlamaConfig(**self.config))
            found = load_gguf_checkpoint(
                str(self.path), return_tensors=True, model_to_load=names, torch_dtype=torch.float32
            )["tensors"]
        while found:
            yield found.popitem()

    def tokenizer(self, scratch: Path, vocab_size: int) -> Path:
        """Write tokenizer.json and text_format.json to the folder ``scratch``.

        Raises PretrainedError if the file's way to split texts is not known.
        """
        kind, numbers = self._kind(), dict(self._numbers(vocab_size))
        # Link it into an empty folder, so that no file beside it is taken for a part of it.
        (scratch / "model.gguf").symlink_to(self.path.resolve())
        with _reading(self.path):
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(
                str(scratch), gguf_file="model.gguf", trust_remote_code=False
            ).backend_tokenizer
        if kind is not None:
            _split_like(kind, found)
        elif not self.text.get(ADD_SPACE, True):
            _without_space(found)
        if self.text.get(ADD_BOS, kind in BEGUN_AND_WHOLE) and not beginning_tokens(found):
            _begin_with(numbers.get("bos_token_id", ()), found)
        template = checked_template(self.path, self.text.get("tokenizer.chat_template"))
        text_format(found, numbers, {}, template, {}).write(scratch)
        found.save(str(scratch / TOKENIZER))
        return scratch / TOKENIZER

    def _kind(self) -> str | None:
        """Return how the tokenizer splits texts; None for SentencePiece, which does not."""
        model, kind = (str(self.text.get(f"tokenizer.ggml.{n}", "")) for n in ("model", "pre"))
        if model == "llama":
            return None
        if model != "gpt2":
            raise PretrainedError(
                f"{self.path}: the tokenizer is of the kind {model[:60]!r}; supported: llama, gpt2"
            )
        if kind not in {*GPT2.split(), *DIGIT_BY_DIGIT.split(), *REGEX}:
            told = f"is {kind[:60]!r}, which is not known" if kind else "is missing"
            raise PretrainedError(
                f"{self.path}: tokenizer.ggml.pre, which says how texts are split into words, "
                f"{told}: import the safetensors folder of the model instead, or, if you know "
                "that another kind splits alike, write it into the file with gguf-new-metadata "
                "--pre-tokenizer KIND"
            )
        return kind

    def _numbers(self, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, keys in NUMBERS.items():
            given = {key: self.text.get(f"tokenizer.ggml.{key}") for key in keys}
            for key, value in given.items():
                if value is None or (type(value) is int and 0 <= value < vocab_size):
                    continue
                raise PretrainedError(
                    f"{self.path}: tokenizer.ggml.{key} is {value!r:.60}, but the model has only "
                    f"the tokens 0 to {vocab_size - 1:,}"
                )
            if found := tuple(value for value in given.values() if value is not None):
                yield name, found


def _split_like(kind: str, tokenizer: Tokenizer) -> None:
    """Split texts as llama.cpp does. The reader of transformers knows few of its kinds."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind in REGEX:
        words = Split(Regex(REGEX[kind]), behavior="isolated")
        tokenizer.pre_tokenizer = Sequence(
            [words, ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        digits = [Digits(individual_digits=True)] if kind in DIGIT_BY_DIGIT.split() else []
        tokenizer.pre_tokenizer = Sequence([*digits, ByteLevel(add_prefix_space=False)])
    if kind in BEGUN_AND_WHOLE:
        tokenizer.model.ignore_merges = True


def _without_space(tokenizer: Tokenizer) -> None:
    """Put no space before a text, which the reader of transformers always does."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    as_space = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([as_space, decoders.ByteFallback(), decoders.Fuse()])


def _begin_with(tokens: Sequence[int], tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    for word, token in ((tokenizer.id_to_token(token), token) for token in tokens):
        if word is None:
            continue
        tokenizer.post_processor = TemplateProcessing(
            single=[word, "$A"], special_tokens=[(word, token)]
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise PretrainedError(
            f"reading GGUF needs the package {error.name}, which is missing: "
            "pip install 'archdsl[transformers]'"
        ) from None
    except Exception as error:  # the libraries raise nothing narrower
        reason = " ".join(str(error).split())[:300]
        raise PretrainedError(f"{path} is not a GGUF file, or is damaged: {reason}") from None


def _name(name: str) -> str:
    """Return the name of a tensor in transformers, or the name itself if it is not known."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    match stem.split("."):
        case ["blk", number, part] if part in LAYER:
            return f"model.layers.{number}.{LAYER[part]}.weight"
    return name


def _config(path: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the config with the keys and values of a config.json."""
    if (parts := fields.get(PARTS, 1)) != 1:
        raise PretrainedError(
            f"{path} is one of {parts} parts of a model: join them with llama-gguf-split --merge "
            "FIRST_PART MODEL.gguf, and import that file"
        )
    architecture = fields.get("general.architecture")
    embedding = stored.get("model.embed_tokens.weight")
    config: dict[str, Any] = {
        "model_type": architecture,
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "vocab_size": embedding.shape[0] if embedding else 0,
    }
    if architecture != "llama":
        return config  # `llama_spec` rejects other architectures
    if "rope_freqs.weight" in stored:
        raise PretrainedError(
            f"{path} stores its rotary scaling as a tensor (rope_freqs.weight), which the reader "
            "of transformers ignores: import the safetensors folder of the model instead"
        )
    own = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    sizes = {name: own.pop(name) for name in HEAD_SIZES if name in own}
    if len(set(sizes.values())) > 1:
        raise PretrainedError(f"{path}: the sizes of the heads differ: {sizes}")
    config["head_dim"] = next(iter(sizes.values()), None)
    for name, value in own.items():
        if name in CONFIG:
            config[CONFIG[name]] = _shortest(value)
        elif value != WITHOUT_EFFECT.get(name, ...):
            raise PretrainedError(f"{path}: llama.{name} = {value!r:.60} is not supported")
    return config


def _shortest(value: Any) -> Any:
    """Shorten a float32 value, for example 9.999999747378752e-06 to 1e-5."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
