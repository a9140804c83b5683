"""LLaMA and what has its maths: their configs as specs, their names for the weights.

Touvron et al. 2302.13971; Grattafiori et al. 2407.21783. The keys are those of transformers' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archdsl.errors import ArchdslError
from archdsl.lang import source
from archdsl.lang.messages import explain
from archdsl.lang.spec import ModelSpec, parse_spec

ARCHITECTURES = ("llama", "mistral")
MISTRAL_WINDOW = 4096  # where its config says nothing
SCALINGS = ("linear", "llama3")

TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}


class PretrainedError(ArchdslError):
    """Files of a pretrained model that are damaged, or that say what archdsl cannot."""


class LlamaConfig(BaseModel):
    """What matters of a config.json; the defaults are what transformers takes for missing keys."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    model_type: str
    vocab_size: int
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(ge=1)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: int | None = None
    partial_rotary_factor: float | None = None
    quantization_config: Any = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None  # as files have it from before transformers 5
    rope_parameters: dict[str, Any] | None = None  # as they have it since, with rope_theta in it

    @property
    def rope(self) -> dict[str, Any]:
        own = {"rope_theta": self.rope_theta}
        return own | (self.rope_scaling or {}) | (self.rope_parameters or {})

    @property
    def rope_type(self) -> Any:
        return self.rope.get("rope_type") or self.rope.get("type") or "default"

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def window(self, context: int) -> int | None:
        """How many tokens back a query sees; None where that is all of the context."""
        missing = "sliding_window" not in self.model_fields_set
        window = MISTRAL_WINDOW if missing else self.sliding_window
        matters = self.model_type == "mistral" and window is not None and window < context
        return window if matters else None

    def unsupported(self) -> Iterator[str]:
        """What the spec has no word for."""
        heads, dim = self.num_attention_heads, self.hidden_size
        if heads % self.kv_heads:
            yield f"{self.kv_heads} key/value heads, which do not divide the {heads} heads"
        if self.head_dim is None and dim % heads:
            yield f"{heads} heads, which do not divide the hidden_size of {dim}"
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                yield f"{name}: true (matrices here have no bias)"
        if self.hidden_act != "silu":
            yield f"hidden_act: {self.hidden_act} (known: silu)"
        if self.quantization_config is not None:
            yield "quantization_config (weights must be plain numbers)"
        partial = self.rope.get("partial_rotary_factor", self.partial_rotary_factor)
        if partial not in (None, 1):
            yield f"partial_rotary_factor: {partial} (whole heads are rotated)"
        if any(isinstance(value, Mapping) for value in self.rope.values()):
            yield "rotary angles that differ from layer to layer"
        elif self.rope_type not in ("default", *SCALINGS):
            known = ", ".join(SCALINGS)
            yield f"rotary scaling of type {self.rope_type!r} (known: {known})"


def llama_spec(
    config: Mapping[str, Any], file: str, *, name: str, context: int | None = None
) -> ModelSpec:
    """The spec that computes what the config describes; ``context``: a shorter one than its own.

    Raises PretrainedError for what is not LLaMA's maths, SpecError for sizes out of bounds.
    """
    read = _read(config, file)
    longest = read.max_position_embeddings
    if context is not None and context > longest:
        raise PretrainedError(f"{file}: the model was made for {longest} tokens, not for {context}")
    tree = {
        "name": name,
        "description": f"A pretrained {read.model_type}.",
        "vocab_size": read.vocab_size,
        "context": context or longest,
        "dim": read.hidden_size,
        "tie_embeddings": read.tie_word_embeddings,
        "norm_eps": read.rms_norm_eps,
        "blocks": [
            {"kind": "stack", "repeat": read.num_hidden_layers, "body": [_layer(read, context)]}
        ],
    }
    return parse_spec(source.from_value(tree, file))


def _read(config: Mapping[str, Any], file: str) -> LlamaConfig:
    found = config.get("model_type")
    if found not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PretrainedError(f"{file}: architecture {found!r:.60} is not known; known: {known}")
    try:
        read = LlamaConfig.model_validate(config)
    except ValidationError as error:
        path, message = explain(error, LlamaConfig.model_fields)[0]
        raise PretrainedError(f"{file}: {'.'.join(map(str, path))}: {message}") from None
    if reasons := "; ".join(read.unsupported()):
        raise PretrainedError(f"{file} asks for what archdsl has not: {reasons}")
    return read


def _layer(config: LlamaConfig, context: int | None) -> dict[str, Any]:
    heads, dim = config.num_attention_heads, config.hidden_size
    head_size = config.head_dim or dim // heads
    attention = {
        "head_size": head_size,
        "heads": None if heads * head_size == dim else heads,
        "queries_per_kv": heads // config.kv_heads,
        "window": config.window(context or config.max_position_embeddings),
        "rope_theta": config.rope["rope_theta"] or 10_000.0,
        "rope_scaling": _scaling(config),
    }
    ffn = {"hidden": config.intermediate_size}
    return {"kind": "layer", "norm_eps": config.rms_norm_eps, "attention": attention, "ffn": ffn}


def _scaling(config: LlamaConfig) -> dict[str, Any] | None:
    rope, kind = config.rope, config.rope_type
    if kind == "default":
        return None
    scaling = {"kind": kind, "factor": rope.get("factor")}
    if kind == "llama3":
        scaling |= {name: rope.get(name) for name in ("low_freq_factor", "high_freq_factor")}
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        scaling["original_context"] = original
    return scaling


def transformers_name(name: str) -> str:
    """What transformers calls a weight of an imported model."""
    stem = name.removesuffix(".weight")
    if inner := re.fullmatch(r"blocks\.0\.blocks\.(\d+)\.(.+)", stem):
        return f"model.layers.{inner[1]}.{LAYER[inner[2]]}.weight"
    return f"{TOP[stem]}.weight"
