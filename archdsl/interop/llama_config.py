"""Convert configs of LLaMA and Mistral models to specs, and names of weights to those models'.

Touvron et al. 2302.13971; Grattafiori et al. 2407.21783; Jiang et al. 2310.06825. The keys are
those of the config.json that transformers writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archdsl.errors import ArchdslError, describe
from archdsl.lang import source
from archdsl.lang.messages import explain
from archdsl.lang.spec import ModelSpec, parse_spec

ARCHITECTURES = ("llama", "mistral")
MISTRAL_WINDOW = 4096  # the default of transformers
SCALINGS = ("linear", "llama3")
OF_SCALING = {  # the rotary parameters that each type uses
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
OF_ANY_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ORIGINAL = "original_max_position_embeddings"

# Fields that change no logit, as transformers and the tools around it write them.
WITHOUT_EFFECT = (
    "architectures _name_or_path transformers_version torch_dtype dtype use_cache bos_token_id "
    "eos_token_id pad_token_id initializer_range pretraining_tp output_attentions "
    "output_hidden_states return_dict return_dict_in_generate id2label label2id problem_type "
    "chunk_size_feed_forward gradient_checkpointing is_encoder_decoder is_decoder "
    "max_sequence_length max_length attn_implementation _attn_implementation "
    "_attn_implementation_autoset"
)
# The names of other fields that may change the logits have one of these words.
EFFECTS = re.compile(
    "multiplier|scal|factor|cap|bias|norm|rope|rotary|window|layer|expert|moe|activation|hidden_act"
    "|causal|bidirectional|attention|alibi|position|parallel|residual|quant|compress|lora|mup|head"
    "|sink|embedding|prun"
)
HARMLESS = re.compile("drop|flash|loss|sdpa")  # in training alone, or another way to the same
ONE_IS_NEUTRAL = re.compile("multiplier|scal|factor")

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
    """Files of a pretrained model are damaged, or describe a model that archdsl cannot express."""


class LlamaConfig(BaseModel):
    """The keys of a config.json that archdsl uses. The defaults are those of transformers."""

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
    rope_scaling: dict[str, Any] | None = None  # in files from before transformers 5
    rope_parameters: dict[str, Any] | None = None  # since transformers 5, including rope_theta
    original_max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary parameters, with ``rope_theta``, from either spelling."""
        own = {"rope_theta": self.rope_theta}
        return own | (self.rope_scaling or {}) | (self.rope_parameters or {})

    @property
    def rope_type(self) -> Any:
        """The type of the rotary scaling; ``default`` means none."""
        return self.rope.get("rope_type") or self.rope.get("type") or "default"

    @property
    def scalings_agree(self) -> bool:
        """False if the older and the newer spelling of the rotary scaling differ in a value."""
        if not self.rope_scaling or not self.rope_parameters:
            return True
        older, newer = (
            {"rope_type": one.get("type")} | one
            for one in (self.rope_scaling, self.rope_parameters)
        )
        return all(newer.get(name) == older[name] for name in older if name != "type")

    def _wrong_rope(self) -> Iterator[str]:
        """Yield each rotary parameter that contradicts another or that its type does not use."""
        rope = self.rope
        spellings = ({"rope_theta": self.rope_theta}, self.rope_scaling, self.rope_parameters)
        thetas = [
            one["rope_theta"] for one in spellings if one and one.get("rope_theta") is not None
        ]
        if any(theta != thetas[0] for theta in thetas):
            yield "rope_theta with different values (leave one of them)"
        used = OF_ANY_ROPE | OF_SCALING[self.rope_type] | {ORIGINAL}
        for name in sorted(name for name in rope.keys() - used if rope[name] not in (None, 1)):
            yield f"{name}: {rope[name]!r:.60} (no rotary parameter of type {self.rope_type})"
        outer = self.original_max_position_embeddings
        if self.rope_type == "llama3" and outer not in (None, rope.get(ORIGINAL)):
            yield f"{ORIGINAL}: {outer} beside rope_parameters with another value"

    def _wrong_window(self) -> Iterator[str]:
        """Yield what contradicts the window, which is the same in all layers."""
        windowed = self.model_type == "mistral" and self._window is not None
        if self.use_sliding_window is not None and self.use_sliding_window != windowed:
            yield f"use_sliding_window: {str(self.use_sliding_window).lower()} (the model has " + (
                "a sliding_window)" if windowed else "none)"
            )
        wanted = "sliding_attention" if windowed else "full_attention"
        if other := set(self.layer_types or ()) - {wanted}:
            yield f"layer_types: {min(other)!r:.60} (supported here: {wanted} in every layer)"

    @property
    def _window(self) -> int | None:
        missing = "sliding_window" not in self.model_fields_set
        return MISTRAL_WINDOW if missing else self.sliding_window

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def window(self, context: int) -> int | None:
        """Return the attention window in tokens; None if it covers the whole context."""
        window = self._window
        matters = self.model_type == "mistral" and window is not None and window < context
        return window if matters else None

    def unsupported(self) -> Iterator[str]:
        """Yield each property of the model that a spec cannot express."""
        heads, dim = self.num_attention_heads, self.hidden_size
        if heads % self.kv_heads:
            yield f"{self.kv_heads} key/value heads, which do not divide the {heads} heads"
        if self.head_dim is None and dim % heads:
            yield f"{heads} heads, which do not divide the hidden_size of {dim}"
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                yield f"{name}: true (archdsl has no biases)"
        if self.hidden_act not in ("silu", "swish"):  # two names of one function
            yield f"hidden_act: {self.hidden_act} (supported: silu)"
        if self.quantization_config is not None:
            yield "quantization_config (quantised weights are not supported)"
        partial = self.rope.get("partial_rotary_factor", self.partial_rotary_factor)
        if partial not in (None, 1):
            yield f"partial_rotary_factor: {partial} (archdsl rotates whole heads)"
        if not self.scalings_agree:
            yield "rope_scaling and rope_parameters with different values (leave one of them)"
        if any(isinstance(value, Mapping) for value in self.rope.values()):
            yield "rotary parameters that differ between layers"
        elif self.rope_type not in ("default", *SCALINGS):
            known = ", ".join(SCALINGS)
            yield f"rotary scaling of type {self.rope_type!r} (supported: {known})"
        else:
            yield from self._wrong_rope()
        yield from self._wrong_window()


def llama_spec(
    config: Mapping[str, Any], file: str, *, name: str, context: int | None = None
) -> ModelSpec:
    """Return the spec of the model that the config describes.

    ``file``: the name of the config's file, for messages. ``name``: the name of the spec.
    ``context``: tokens; at most the model's own, which is the default.

    Raises PretrainedError if the model is not of the LLaMA family or archdsl cannot express it, and
    SpecError if a size is out of bounds.
    """
    read = _read(config, file)
    longest = read.max_position_embeddings
    if context is not None and context > longest:
        raise PretrainedError(f"{file}: the model has a context of {longest} tokens, not {context}")
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


def own_spec(
    config: Mapping[str, Any], file: str, *, name: str | None = None, context: int | None = None
) -> ModelSpec:
    """Return the spec of a model that `archdsl export` wrote.

    Since then its vocabulary may have grown, and its head may have been untied from the embedding.

    The parameters and errors are those of `llama_spec`; the default of ``name`` is the spec's own.
    """
    tree = config.get("spec")
    if not isinstance(tree, Mapping):
        raise PretrainedError(f"{file}: spec: must be a mapping, got {describe(tree)}")
    since = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
    tree = {**tree, **{own: config[name] for own, name in since.items() if name in config}}
    spec = parse_spec(source.from_value(tree, f"{file}: spec"))
    if context is not None and context > spec.context:
        raise PretrainedError(
            f"{file}: the model has a context of {spec.context} tokens, not {context}"
        )
    new = {"name": name or spec.name, "context": context or spec.context}
    return parse_spec(source.from_value(tree | new, f"{file}: spec"))


def _read(config: Mapping[str, Any], file: str) -> LlamaConfig:
    found = config.get("model_type")
    if found not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PretrainedError(
            f"{file}: architecture {found!r:.60} is not supported; supported: {known}"
        )
    try:
        read = LlamaConfig.model_validate(config)
    except ValidationError as error:
        path, message = explain(error, LlamaConfig.model_fields)[0]
        raise PretrainedError(f"{file}: {'.'.join(map(str, path))}: {message}") from None
    reasons = "; ".join([*read.unsupported(), *_unknown_effects(config)])
    if reasons:
        raise PretrainedError(f"{file} has properties that archdsl does not support: {reasons}")
    return read


def unused_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields that archdsl does not know and whose values say something."""
    known = {*LlamaConfig.model_fields, *WITHOUT_EFFECT.split()}
    others = sorted(name for name in config.keys() - known if not HARMLESS.search(name))
    return [name for name in others if not _is_neutral(name, config[name])]


def _unknown_effects(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the unknown fields whose names say that they may change the logits."""
    for name in filter(EFFECTS.search, unused_fields(config)):
        yield f"{name}: {config[name]!r:.60} (a field that archdsl does not know)"


def _is_neutral(name: str, value: Any) -> bool:
    if value is None:
        return True
    if "causal" in name:
        return value is True
    if ONE_IS_NEUTRAL.search(name):
        return value is False or (value == 1 and value is not True)
    return not value


def _layer(config: LlamaConfig, context: int | None) -> dict[str, Any]:
    heads, dim = config.num_attention_heads, config.hidden_size
    head_size = config.head_dim or dim // heads
    attention = {
        "head_size": head_size,
        "heads": None if heads * head_size == dim else heads,
        "queries_per_kv": heads // config.kv_heads,
        "window": config.window(context or config.max_position_embeddings),
        "rope_theta": 10_000.0 if config.rope["rope_theta"] is None else config.rope["rope_theta"],
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
    """Return the name in transformers of a weight of an imported model."""
    stem = name.removesuffix(".weight")
    if inner := re.fullmatch(r"blocks\.0\.blocks\.(\d+)\.(.+)", stem):
        return f"model.layers.{inner[1]}.{LAYER[inner[2]]}.weight"
    return f"{TOP[stem]}.weight"
