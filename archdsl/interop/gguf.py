"""Read GGUF, the single-file format of llama.cpp, with the names that transformers uses.

The reader of transformers dequantises the weights and builds the tokenizer.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from archdsl.interop.llama_config import PretrainedError

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
WITHOUT_EFFECT = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
# Tokenizers of llama.cpp that make each digit a token, which the reader of transformers ignores.
DIGIT_BY_DIGIT = ("smollm",)


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
                if not name.startswith("tokenizer.ggml.")
            }
            splitting = reader.fields.get("tokenizer.ggml.pre")
            self.splitting = splitting and splitting.contents()
            stored = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
        self.shapes = {_name(name): tuple(shape) for name, shape in stored.items()}
        self.config = _config(path, fields, self.shapes)

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

    def tokenizer(self, scratch: Path) -> Path:
        """Write tokenizer.json to the folder ``scratch`` and return its path."""
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        # Link it into an empty folder, so that no file beside it is taken for a part of it.
        (scratch / "model.gguf").symlink_to(self.path.resolve())
        with _reading(self.path):
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(
                str(scratch), gguf_file="model.gguf", trust_remote_code=False
            ).backend_tokenizer
        if self.splitting in DIGIT_BY_DIGIT:
            digits = Digits(individual_digits=True)
            found.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
        found.save(str(scratch / "tokenizer.json"))
        return scratch / "tokenizer.json"


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
        raise PretrainedError(f"{path} is not a GGUF file, or is damaged: {error}") from None


def _name(name: str) -> str:
    """Return the name of a tensor in transformers, or the name itself if it is not known."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    match stem.split("."):
        case ["blk", number, part] if part in LAYER:
            return f"model.layers.{number}.{LAYER[part]}.weight"
    return name


def _config(
    path: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the config with the keys and values of a config.json."""
    architecture = fields.get("general.architecture")
    config: dict[str, Any] = {
        "model_type": architecture,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "vocab_size": shapes.get("model.embed_tokens.weight", (0,))[0],
    }
    if architecture != "llama":
        return config  # `llama_spec` rejects other architectures
    if "rope_freqs.weight" in shapes:
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
