"""The same LLaMA with the same weights in archdsl and in other libraries.

The other libraries are transformers and, if they are installed, LitGPT and x-transformers.

Shapes: B batch, T tokens, V vocabulary, D width, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.attention import AttentionSpec
from archdsl.blocks.feed_forward import FeedForwardSpec
from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.stack import StackSpec
from archdsl.data.types import Batch
from archdsl.evaluation.evaluate import cross_entropy
from archdsl.interop.llama_config import transformers_name
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel
from benchmarks.measure import check_equal, progress

Weights = dict[str, Tensor]  # by their names in transformers


@dataclass(frozen=True)
class Peer:
    """A model of another library.

    ``logits``: from tokens [B, T] to logits [B, T, V]. ``loss``: from tokens and targets [B, T] to
    the mean loss, computed as the library does.
    """

    name: str
    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def weights_to(peer: nn.Module, dtype: torch.dtype) -> None:
    """Moves the weights of a peer to a data type, but not its rotary frequencies, which are buffers
    that transformers keeps in float32."""
    for weight in peer.parameters():
        weight.data = weight.data.to(dtype)


def random_batch(spec: ModelSpec, rows: int, tokens: int, device: str = "cpu") -> Batch:
    """Returns a batch of random tokens, always the same one."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(spec.vocab_size, (rows, tokens + 1), generator=rng).to(device)
    return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())


def peers_of(ours: LanguageModel, *, extras: bool = True, without: str = "") -> Iterator[Peer]:
    """Yields models of other libraries with a copy of the weights and equal logits.

    ``ours``: a model of a single stack of plain layers. ``extras``: also use libraries other than
    transformers. ``without``: the name of one that is left out. Raises NotEqual if logits or losses
    differ.
    """
    weights = {transformers_name(name): w.detach().clone() for name, w in ours.state_dict().items()}
    device = ours.embedding.weight.device
    makers = {"transformers": ("transformers", _transformers)}
    if extras:
        makers |= {
            "LitGPT": ("litgpt", _litgpt),
            "x-transformers": ("x_transformers", _x_transformers),
        }
    batch = random_batch(ours.spec, 1, min(64, ours.spec.context), str(device))
    with torch.no_grad():
        wanted_BTV = ours.eval()(batch.tokens_BT)
        wanted = cross_entropy(wanted_BTV, batch.targets_BT).mean()
    makers.pop(without, None)
    for name, (package, make) in makers.items():
        if find_spec(package) is None:
            progress(f"{name} is not installed, so it is left out")
            continue
        peer = make(ours.spec, weights, device)
        with torch.no_grad():
            check_equal(f"logits of {name}", peer.logits(batch.tokens_BT), wanted_BTV)
            check_equal(f"loss of {name}", peer.loss(batch.tokens_BT, batch.targets_BT), wanted)
        yield peer


class Shape(NamedTuple):
    """The sizes of a LLaMA."""

    depth: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    theta: float


def shape_of(spec: ModelSpec) -> Shape:
    """Returns the sizes of a spec that is a single stack of plain layers."""
    (stack,) = spec.blocks
    assert isinstance(stack, StackSpec)
    (layer,) = stack.body
    assert isinstance(layer, LayerSpec)
    attention, ffn = layer.attention, layer.ffn
    assert isinstance(attention, AttentionSpec)
    assert isinstance(ffn, FeedForwardSpec)
    assert attention.rope_theta is not None
    heads = attention.head_count(spec.dim)
    return Shape(
        stack.repeat,
        heads,
        heads // attention.queries_per_kv,
        attention.head_size,
        ffn.hidden_size(spec.dim),
        attention.rope_theta,
    )


def _transformers(spec: ModelSpec, weights: Weights, device: torch.device) -> Peer:
    import transformers

    shape = shape_of(spec)
    config = cast(Any, transformers.LlamaConfig)(
        vocab_size=spec.vocab_size,
        hidden_size=spec.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=spec.context,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=spec.tie_embeddings,
        attn_implementation="sdpa",
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device)
    model.load_state_dict(weights)
    return Peer(
        "transformers",
        model,
        lambda tokens_BT: model(tokens_BT, use_cache=False).logits,
        lambda tokens_BT, targets_BT: (
            model(tokens_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss
        ),
    )


def _litgpt(spec: ModelSpec, weights: Weights, device: torch.device) -> Peer:
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = shape_of(spec)
    config = Config(
        block_size=spec.context,
        n_layer=shape.depth,
        n_embd=spec.dim,
        padded_vocab_size=spec.vocab_size,
        vocab_size=spec.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=spec.norm_eps,
        parallel_residual=False,
        n_head=shape.heads,
        head_size=shape.head_size,
        n_query_groups=shape.kv_heads,
        rotary_percentage=1.0,
        rope_base=shape.theta,
        intermediate_size=shape.hidden,
        mlp_class_name="LLaMAMLP",
        bias=False,
    )
    model = GPT(config).to(device)
    if spec.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    state = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for n in range(shape.depth):
        of = _layer_weights(weights, n)
        qkv = torch.cat([of["self_attn.q_proj"], of["self_attn.k_proj"], of["self_attn.v_proj"]])
        state |= {
            f"transformer.h.{n}.{name}.weight": weight
            for name, weight in {
                "norm_1": of["input_layernorm"],
                "attn.qkv": qkv,
                "attn.proj": of["self_attn.o_proj"],
                "norm_2": of["post_attention_layernorm"],
                "mlp.fc_1": of["mlp.gate_proj"],
                "mlp.fc_2": of["mlp.up_proj"],
                "mlp.proj": of["mlp.down_proj"],
            }.items()
        }
    model.load_state_dict(state)
    return Peer("LitGPT", model, model, _plain_loss(model))


def _x_transformers(spec: ModelSpec, weights: Weights, device: torch.device) -> Peer:
    from x_transformers import Decoder, TransformerWrapper

    shape = shape_of(spec)
    decoder = Decoder(
        dim=spec.dim,
        depth=shape.depth,
        heads=shape.heads,
        attn_dim_head=shape.head_size,
        attn_kv_heads=shape.kv_heads,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=shape.head_size,
        use_rmsnorm=True,
        norm_add_unit_offset=False,
        ff_mult=shape.hidden / spec.dim,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
    )
    model = TransformerWrapper(
        num_tokens=spec.vocab_size,
        max_seq_len=spec.context,
        use_abs_pos_emb=False,
        tie_embedding=spec.tie_embeddings,
        tie_embedding_scale=1.0,
        attn_layers=decoder,
    ).to(device)
    with torch.no_grad():
        for name, weight in _x_transformers_weights(weights, shape.depth, shape.head_size).items():
            model.get_parameter(name).copy_(weight)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # its gated projection has a bias, that of LLaMA has none
                parameter.zero_()
        if not spec.tie_embeddings:
            cast(nn.Linear, model.to_logits).weight.copy_(weights["lm_head.weight"])
    return Peer("x-transformers", model, model, _plain_loss(model))


def _x_transformers_weights(weights: Weights, depth: int, head_size: int) -> Weights:
    """Converts the weights. Its rotary embedding rotates neighbours, (0, 1), (2, 3) ..., while that
    of LLaMA rotates the two halves."""

    def neighbours(weight: Tensor) -> Tensor:
        halves = weight.unflatten(0, (-1, 2, head_size // 2))  # H, half, E / 2, D
        return halves.transpose(1, 2).flatten(0, 2)

    state = {
        "token_emb.emb.weight": weights["model.embed_tokens.weight"],
        "attn_layers.final_norm.g": weights["model.norm.weight"],
    }
    for n in range(depth):
        of, attn, ffn = _layer_weights(weights, n), 2 * n, 2 * n + 1
        state |= {
            f"attn_layers.layers.{attn}.0.0.g": of["input_layernorm"],
            f"attn_layers.layers.{attn}.1.to_q.weight": neighbours(of["self_attn.q_proj"]),
            f"attn_layers.layers.{attn}.1.to_k.weight": neighbours(of["self_attn.k_proj"]),
            f"attn_layers.layers.{attn}.1.to_v.weight": of["self_attn.v_proj"],
            f"attn_layers.layers.{attn}.1.to_out.weight": of["self_attn.o_proj"],
            f"attn_layers.layers.{ffn}.0.0.g": of["post_attention_layernorm"],
            f"attn_layers.layers.{ffn}.1.ff.0.proj.weight": torch.cat(
                [of["mlp.up_proj"], of["mlp.gate_proj"]]
            ),
            f"attn_layers.layers.{ffn}.1.ff.2.weight": of["mlp.down_proj"],
        }
    return state


def _layer_weights(weights: Weights, n: int) -> Weights:
    stem = f"model.layers.{n}."
    return {
        name.removeprefix(stem).removesuffix(".weight"): weight
        for name, weight in weights.items()
        if name.startswith(stem)
    }


def _plain_loss(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tokens_BT, targets_BT: F.cross_entropy(
        model(tokens_BT).flatten(0, 1), targets_BT.flatten()
    )
