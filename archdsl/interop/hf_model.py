"""The language model as one of transformers' own: config, model, cache.

Importing this module makes the Auto classes know it, so that an exported folder loads without code
of its own. The folder carries this very source (see `archdsl.interop.source_bundle`)
for those without archdsl.

Shapes: B batch, T tokens of a chunk, S tokens so far with the chunk, D width, V vocabulary.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.feed_forward import FeedForward
from archdsl.blocks.modules.layer import Layer
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.backbone import Backbone, final_norm
from archdsl.nn.block import Block, Context, KeysValues, Primitive, Trace, normal_, stream_depth
from archdsl.nn.cache import Cache, ContextFullError, Stream
from archdsl.nn.loop import DialError

logger = logging.get_logger(__name__)
INSTALLED = "archdsl.interop.hf_model"  # not so where this is the code of an export
MASK = "attention_mask must be [batch, tokens so far]"


class UnsupportedError(ArchdslError, ValueError):
    """Something that transformers offers and these models cannot do."""


IN_SPEC = {  # what a config and its spec both say, by its two names
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "tie_word_embeddings": "tie_embeddings",
}


class ArchdslConfig(transformers.PreTrainedConfig):
    """``spec``: the whole spec as plain data; the sizes that tools look for are taken from it.

    ``use_cache``: whether a forward pass that does not say so returns a cache; in training, one of
    a model with routers does not. ``see_later_tokens``: whether routers that see later
    tokens in training do so outside of it, too. Off, because the logits then are no predictions:
    scores of likelihood would be better than any text that the model can generate.
    """

    model_type: ClassVar[str] = "archdsl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # as Llama's has them: `from_pretrained` takes them, and other tools read them
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        use_cache: bool = True,
        see_later_tokens: bool = False,
        **more: Any,
    ) -> None:
        self.spec, self.use_cache, self.see_later_tokens = spec, use_cache, see_later_tokens
        if spec is not None:
            more = {"tie_word_embeddings": spec["tie_embeddings"]} | more
            self.vocab_size, self.hidden_size = spec["vocab_size"], spec["dim"]
            self.max_position_embeddings = spec["context"]
        super().__init__(**more)

    def __setattr__(self, name: str, value: Any) -> None:
        """Where the vocabulary, the context or the tying is changed, the spec follows."""
        if name in IN_SPEC and (spec := self.__dict__.get("spec")):
            self.__dict__["spec"] = spec | {IN_SPEC[name]: value}
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    def describe(self, attentions: list[Attention], layers: int, modules: list[Attention]) -> None:
        """Notes what caches and serving engines want to know of each attention of each pass.

        ``attentions``: in their order; none where only the model itself can compute them.
        ``layers``: the number of layers, which counts then. ``modules``: all attention of the
        model; the numbers and sizes of heads are noted if all are alike.
        """
        self.num_hidden_layers = len(attentions) or layers
        shapes = {(one.q.out_features, one.k.out_features, one.head_size) for one in modules}
        if len(shapes) == 1:
            q_size, kv_size, self.head_dim = shapes.pop()
            self.num_attention_heads = q_size // self.head_dim
            self.num_key_value_heads = kv_size // self.head_dim
        windows = {one.window for one in attentions if one.window is not None}
        self.sliding_window = max(windows, default=None)
        if windows:
            self.layer_types = [
                "sliding_attention" if one.window else "full_attention" for one in attentions
            ]


class ArchdslCache(transformers.Cache):
    """What a model keeps of the tokens so far, as `generate` wants to see it."""

    def __init__(self, kept: Cache) -> None:
        super().__init__(layers=[])
        self.kept = kept
        self.seen = 0  # tokens of a row, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The number of tokens that there is room for."""
        return self.kept.max_length

    @property
    def max_cache_len(self) -> int:
        """The number of tokens that there is room for."""
        return self.kept.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.kept.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, which may also be a mask [B] of booleans."""
        self.kept.reorder(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Follows each row by ``repeats`` - 1 copies of it."""
        if self.kept.rows is not None:
            self.kept.reorder(torch.arange(self.kept.rows).repeat_interleave(repeats))

    def make_room(self, tokens: int, context: int) -> None:
        """Grows, by doubling and up to the context, if so many further tokens need it."""
        needed, room = self.seen + tokens, self.kept.max_length
        if room < min(needed, context):
            self.kept.grow(min(max(needed, 2 * room), context))

    def reset(self) -> None:
        """Forgets all tokens."""
        self.kept, self.seen = Cache(self.kept.max_length), 0

    @property
    def is_croppable(self) -> bool:
        """False: tokens cannot be removed again."""
        return False

    def activate_past_recording(self) -> None:
        """Raises UnsupportedError, as `crop` does."""
        self.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UnsupportedError: tokens cannot be removed again."""
        raise UnsupportedError(
            "the cache of an archdsl model cannot forget tokens again, as assisted generation "
            "needs it; generate without an assistant"
        )

    def update(self, *states: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Raises UnsupportedError: only the model itself writes to this cache."""
        raise UnsupportedError("the cache of an archdsl model is written by that model alone")


class Attend(nn.Module):
    """One attention of one pass, as transformers and serving engines know attention: without
    parameters, with the number ``layer_idx`` of its keys and values in a cache."""

    is_causal = True

    def __init__(self, config: ArchdslConfig, attention: Attention, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = attention.head_size, attention.head_size**-0.5
        self.num_key_value_groups = attention.q.out_features // attention.k.out_features
        self.sliding_window = attention.window

    def forward(
        self, q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Any, more: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What is read, [B, T, H, E], and the weights [B, H, T, S] where they are computed."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        found: tuple[Tensor, Tensor | None] = attend(
            self,
            q_BHTE,
            k_BGSE,
            v_BGSE,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **more,
        )
        return found


def eager(
    module: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which also returns its weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    score_BHTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        score_BHTS = score_BHTS + attention_mask
    weight_BHTS = score_BHTS.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weight_BHTS @ value).transpose(1, 2).contiguous(), weight_BHTS


@dataclass
class InTransformers:
    """The attention, masks and cache of transformers in a pass; a `Host`.

    ``masks``: by window; made when first asked for. ``more``: what attention functions are given
    besides.
    """

    model: ArchdslModel
    x_BTD: Tensor
    mask: Any
    position_ids: Tensor
    cache: transformers.Cache | None
    more: dict[str, Any]
    masks: dict[int | None, Any] = field(default_factory=dict)
    last: dict[int, Attend] = field(default_factory=dict)  # of each attention

    def keep(self, module: Primitive, path: tuple[int, ...], new: KeysValues) -> KeysValues:
        """See `Host.keep`."""
        call = cast(Attend, self.model.calls[self.model.numbers[module.number, path]])
        self.last[module.number] = call
        if call.sliding_window not in self.masks:  # of how many keys, the cache says before
            self.masks[call.sliding_window] = self._mask(call)
        if self.cache is None:
            return new
        return KeysValues(*self.cache.update(new.k_BGSE, new.v_BGSE, call.layer_idx), None)

    def attend(self, module: Primitive, q_BHTE: Tensor, kv: KeysValues) -> Tensor:
        """See `Host.attend`."""
        call = self.last[module.number]
        mask = self.masks[call.sliding_window]
        return call(q_BHTE, kv.k_BGSE, kv.v_BGSE, mask, self.more)[0].transpose(1, 2)

    def _mask(self, call: Attend) -> Any:
        window = call.sliding_window
        if isinstance(self.mask, dict):  # made by `generate` before, for each type of layer
            return self.mask["full_attention" if window is None else "sliding_attention"]
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        return make(
            config=self.model.config,
            inputs_embeds=self.x_BTD,
            attention_mask=self.mask,
            past_key_values=self.cache,
            position_ids=self.position_ids,
            layer_idx=call.layer_idx,
        )


class Embedded(nn.Module):
    """The place where the hidden state before the first layer can be seen."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``x_BTD``."""
        return x_BTD


class Stage(GradientCheckpointingLayer):
    """Runs a layer, whose activations are recomputed in the backward pass if that is asked for."""

    def forward(self, x_BTD: Tensor, layer: nn.Module, ctx: Context) -> Tensor:
        """The stream after the layer, [B, T, D]."""
        return cast(Tensor, layer(x_BTD, ctx))


class ArchdslPreTrainedModel(transformers.PreTrainedModel):
    """What the model without and with a head have in common."""

    config: ArchdslConfig
    config_class = ArchdslConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules: ClassVar[list[str]] = ["Layer", "BodyLoop"]  # type: ignore[misc]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]  # type: ignore[misc]
    _can_record_outputs: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "hidden_states": [
            OutputRecorder(Embedded, capture_initial_hidden_state=False),
            OutputRecorder(Layer, capture_initial_hidden_state=False),
        ],
        "attentions": OutputRecorder(Attend, index=1),
    }

    def _init_weights(self, module: nn.Module) -> None:
        """Draws what was not loaded, as archdsl does; by torch's own seed."""
        rng = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())))
        match module:
            case Primitive():
                if not _is_loaded(module):
                    module.reset(rng, stream_depth(self))
            case nn.Embedding():
                tied = self.config.tie_word_embeddings
                normal_(module.weight, module.embedding_dim**-0.5 if tied else 1.0, rng)
            case nn.Linear() if module in set(self.children()):  # a head
                normal_(module.weight, module.in_features**-0.5, rng)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.LayerNorm() | nn.RMSNorm():
                nn.init.ones_(module.weight)

    @property
    def without_head(self) -> ArchdslModel:
        """The model without its head, which may be this one."""
        return cast(ArchdslModel, self.base_model)

    def dial(
        self,
        capacity: Sequence[float] | float | None = None,
        steps: int | None = None,
        exit: float | None = None,
    ) -> None:
        """See `Backbone.dial`."""
        self.without_head.dial(capacity, steps, exit)

    def new_cache(self, max_length: int | None = None) -> transformers.Cache:
        """An empty one. ``max_length``: the tokens of each row that an `ArchdslCache` has room
        for; default: the context."""
        return self.without_head.new_cache(max_length)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **more: Any
    ) -> None:
        """As transformers has it, with all that the routers learned, as it was trained: a setting
        of the dial is not saved. If the config names the code, that is written, too.

        What an earlier save left is removed, one file after shards or shards after one file: it
        would be loaded in place of what was written.
        """
        self.without_head.commit()
        before = _saved(Path(save_directory))
        with self.without_head.as_trained():
            super().save_pretrained(save_directory, *args, **more)
        if __name__ == INSTALLED and getattr(self.config, "auto_map", None):
            exporter: Any = importlib.import_module("archdsl.interop.hf_export")
            exporter.write_code(Path(save_directory), self.without_head.spec)
        after = _saved(Path(save_directory))
        left = [path for path, stamp in before.items() if after.get(path) == stamp]
        if len(left) < len(after):  # something was written
            for path in left:
                path.unlink()

    def resize_token_embeddings(self, *args: Any, **more: Any) -> nn.Embedding:
        """As transformers has it; the spec follows, so that what is saved can be loaded again."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **more)
        self.config.vocab_size = embedding.num_embeddings
        self.without_head.spec = ModelSpec.model_validate(self.config.spec)
        head: nn.Module | None = self.get_output_embeddings()  # type: ignore[no-untyped-call]
        for module in (embedding, head):
            if module is not None:  # so that `post_init` draws nothing anew
                cast(Any, module.weight)._is_hf_initialized = True
        return embedding


class ArchdslModel(Backbone, ArchdslPreTrainedModel):
    """Tokens to hidden states: the model without its head.

    ``standard``: whether the attention, masks and caches of transformers are used, which serving
    engines replace by their own. So it is unless there is a router, a loop with ``kv: all``, a
    block of another package, a window of one token, or windows of several sizes.
    ``calls``: then each attention of each pass that keeps keys and values, in their order.
    """

    def __init__(self, config: ArchdslConfig) -> None:
        super().__init__(config)
        self.spec = spec = ModelSpec.model_validate(config.spec)
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = final_norm(spec)
        self.embedded, self.stage = Embedded(), Stage()
        self.find_parts()
        if not self.standard and config._attn_implementation not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"attn_implementation={config._attn_implementation!r}: this model computes its "
                "attention itself (see ArchdslModel.standard); leave attn_implementation out"
            )
        self.post_init()  # type: ignore[no-untyped-call]

    def find_parts(self) -> None:
        """See `Backbone.find_parts`."""
        super().find_parts()
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        windows = {one.window for one in blocks if isinstance(one, Attention)} - {None}
        alike = len(windows) < 2 and 1 not in windows  # as masks and caches of transformers know
        joined = any(isinstance(one, BodyLoop) and one.spec.kv == "all" for one in blocks)
        hosted = all(block.hosted for block in blocks)
        self.standard = alike and hosted and not self.routers and not joined
        self._number_calls()

    def dial(
        self,
        capacity: Sequence[float] | float | None = None,
        steps: int | None = None,
        exit: float | None = None,
    ) -> None:
        """See `Backbone.dial`. Raises DialError for an exit in a model that was exported without:
        attention and caches of transformers have no place for tokens that stop."""
        if exit is not None and self.standard:
            raise DialError(
                "this model was exported so that every token takes every pass; set the threshold "
                "of its exit in the spec below 1 before it is exported"
            )
        super().dial(capacity, steps, exit)
        self._number_calls()

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within the block, all loops have the steps that they were trained with."""
        before = [loop.passes for loop in self.loops]
        if all(len(loop.passes) == loop.steps for loop in self.loops):
            yield
            return
        self.dial()
        try:
            yield
        finally:
            for loop, passes in zip(self.loops, before, strict=True):
                loop.passes = passes
            self._number_calls()

    def _number_calls(self) -> None:
        runs = list(_runs(self, ())) if self.standard else []
        self.numbers = {(one.number, path): i for i, (one, path) in enumerate(runs)}
        self.calls = nn.ModuleList([Attend(self.config, one, i) for i, (one, _) in enumerate(runs)])
        modules = [one for one in self.modules() if isinstance(one, Attention)]
        self.config.describe([one for one, _ in runs], len(self.layers), modules)
        if self.standard:
            vars(self.config)["base_model_tp_plan"] = _tensor_parallel_plan(self)

    def new_cache(self, max_length: int | None = None) -> transformers.Cache:  # type: ignore[override]
        """See `ArchdslPreTrainedModel.new_cache`."""
        if self.standard:
            return transformers.DynamicCache(config=self.config)
        return ArchdslCache(super().new_cache(max_length))

    def call_layer(self, layer: nn.Module, x_BTD: Tensor, ctx: Context) -> Tensor:
        """See `Backbone.call_layer`."""
        return cast(Tensor, self.stage(x_BTD, layer, ctx))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: transformers.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states [B, T, D] after the last norm.

        ``attention_mask`` [B, S]: 0 is padding, on whatever side; where the model is ``standard``,
        also a mask [B, 1, T, S]. Raises ContextFullError past the context.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache, x_BTD.size(1))
        run: Any = self._standard if self.standard else self._own
        if self.standard and self._must_know_padding(attention_mask):
            run, cache = self._own, None
        found: BaseModelOutputWithPast = run(x_BTD, attention_mask, position_ids, cache, **more)
        return found

    @capture_outputs  # type: ignore[untyped-decorator]
    def _standard(
        self,
        x_BTD: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        cache: transformers.Cache | None,
        /,  # an engine may have a `cache` of its own in ``more``
        **more: Any,
    ) -> BaseModelOutputWithPast:
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None:
            self._check_passes(cache)
        _check_mask(past, mask, x_BTD)
        if cache is not None or position_ids is None:
            _check_room(past, mask, x_BTD, self.config.max_position_embeddings)
        if position_ids is None:
            position_ids = _positions(past, mask, x_BTD)
        x_BTD = self.embedded(x_BTD)
        host = InTransformers(self, x_BTD, mask, position_ids, cache, more)
        # all written out, because the compiler does not know default factories
        ctx = Context(Stream(), position_ids, trace=Trace(), tables={}, host=host)
        for layer in self.layers:
            x_BTD = self.run_layer(layer, x_BTD, ctx)
        if self.training:
            self.trace = ctx.trace
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=cache)

    def _must_know_padding(self, mask: Any) -> bool:
        """Whether experts or exits of the model learn from tokens of which some are padding: masks
        of transformers do not tell them which."""
        if not (self.training and (self.counting or any(one.thresholds for one in self.loops))):
            return False  # without a look at the mask, which a traced graph must not have
        return isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())

    def _check_passes(self, cache: transformers.Cache) -> None:
        """Raises DialError unless all tokens of a cache were computed in as many passes."""
        passes = [len(loop.passes) for loop in self.loops]
        if getattr(cache, "archdsl_passes", passes) != passes:
            raise DialError("the dial was turned while a cache was in use; begin with a new one")
        cast(Any, cache).archdsl_passes = passes

    def _own(
        self,
        x_BTD: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        cache: ArchdslCache | None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        if self._wanted("output_attentions", more):
            raise UnsupportedError(
                "a model with a router, or with kv: all, returns no attention weights: a step "
                "attends to other keys than those of all tokens once"
            )
        states = [x_BTD] if self._wanted("output_hidden_states", more) else None
        mask_BT = _of_chunk(0 if cache is None else cache.seen, mask, x_BTD)
        pos_BT = _own_positions(position_ids, mask, x_BTD, cache)
        if cache is not None:
            cache.make_room(x_BTD.size(1), self.config.max_position_embeddings)
        sees = self.training or self.config.see_later_tokens
        with nullcontext() if sees else self.causal_routing():
            kept = None if cache is None else cache.kept
            hidden_BTD = self.hidden(x_BTD, mask_BT, kept, states, pos_BT)
        if cache is not None:
            cache.seen += x_BTD.size(1)
        normed_BTD = self.norm(hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=normed_BTD,
            past_key_values=cache,
            hidden_states=None if states is None else (*states[:-1], normed_BTD),
        )

    def _cache(
        self, given: transformers.Cache | None, use_cache: bool | None, tokens: int
    ) -> transformers.Cache | None:
        if given is not None and isinstance(given, ArchdslCache) == self.standard:
            raise UnsupportedError(
                f"this model cannot use a {type(given).__name__}: give it what its new_cache() "
                "returns"
            )
        if use_cache is None:  # with a cache, no router sees later tokens
            sees = not self.standard and (self.training or self.config.see_later_tokens)
            use_cache = self.config.use_cache and not sees
        if not use_cache and given is None:
            return None
        recomputes = self.stage.gradient_checkpointing and self.training
        if recomputes and torch.is_grad_enabled():  # not so in `generate`
            if given is not None:
                raise UnsupportedError(
                    "gradient checkpointing computes each layer twice, so it cannot be used with "
                    "a cache; switch it off, or call the model under torch.no_grad()"
                )
            logger.warning_once("gradient checkpointing computes twice: nothing is kept")
            return None
        room = min(tokens, self.config.max_position_embeddings)
        return self.new_cache(room) if given is None else given

    def _wanted(self, name: str, more: dict[str, Any]) -> bool:
        wanted = more.pop(name, None)
        return bool(getattr(self.config, name, False) if wanted is None else wanted)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **more: Any) -> None:
        function = more.get("gradient_checkpointing_func")
        reentrant = isinstance(function, partial) and function.keywords.get("use_reentrant")
        exits = any(loop.thresholds for loop in self.loops)
        if enable and reentrant and (self.routers or self.counting or exits):
            raise UnsupportedError(
                "use_reentrant would lose the gradient of the losses that routers and exits learn "
                "by, and what batches show to routers and experts; set it to False"
            )
        super()._set_gradient_checkpointing(enable, *args, **more)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embedding = cast(nn.Embedding, value)


class ArchdslForCausalLM(ArchdslPreTrainedModel, transformers.GenerationMixin):
    """Tokens to the logits of their successors.

    A router that sees later tokens does so in training alone, unless the config says
    ``see_later_tokens``; never with a cache or in `generate`.
    """

    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}  # type: ignore[misc]
    _tied_weights_keys: ClassVar[dict[str, str]] = {  # type: ignore[misc]  # one of the instance
        "lm_head.weight": "model.embedding.weight"
    }

    def __init__(self, config: ArchdslConfig) -> None:
        super().__init__(config)
        # Trainer shifts the labels for label smoothing only if it finds the class here.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(config.model_type, type(self).__name__)
        self.model = ArchdslModel(config)
        self.lm_head = nn.Linear(self.model.spec.dim, self.model.spec.vocab_size, bias=False)
        self._is_stateful = not self.model.standard  # no token can be forgotten again
        self.model.readout = self._readout
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: transformers.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with ``labels`` [B, T] also the loss, shifted here, -100 left out.

        See `ArchdslModel.forward` for the rest.
        """
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **more,
        )
        if labels is None and self.training and torch.is_grad_enabled() and self.model.trace.losses:
            logger.warning_once(
                "without labels there is no loss in the output, and so none by which the routers "
                "learn: add sum(model.model.trace.losses.values()) to your own loss"
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(found.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits_BTV, labels, more),
            logits=logits_BTV,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def _loss(self, logits_BTV: Tensor, labels_BT: Tensor, more: dict[str, Any]) -> Tensor:
        whole = more.get("num_items_in_batch")  # targets of a batch that this is a part of
        targets = (labels_BT[..., 1:] != -100).sum()
        if self.training and self.model.trace.passes:
            loss = self._loss_of_passes(labels_BT) / (targets if whole is None else whole)
        else:
            loss = self.loss_function(logits_BTV, labels_BT, self.config.vocab_size, **more)
        if self.training:  # routers learn by losses of their own
            part = 1 if whole is None else targets / whole
            loss = loss + part * sum(self.model.trace.losses.values())
        return loss

    def _loss_of_passes(self, labels_BT: Tensor) -> Tensor:
        """The weighted losses after the passes of the last block, summed over the targets."""
        losses = []
        for x_BTD, weight_BT in self.model.trace.passes:
            logits_NV = self._readout(x_BTD[:, :-1]).flatten(0, 1).float()
            target_N = labels_BT[:, 1:].flatten().to(logits_NV.device)
            nats_N = F.cross_entropy(logits_NV, target_N, reduction="none")  # 0 at -100
            losses.append((nats_N * weight_BT[:, :-1].flatten()).sum())
        return torch.stack(losses).sum()

    def _readout(self, x_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.lm_head(self.model.norm(x_BTD)))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **more: Any) -> Any:
        """As transformers has it. Raises UnsupportedError for a folder whose head has the name
        that archdsl gave it once: the head would be drawn at random."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **more)
        model, info = found
        if "model.head.weight" in info["unexpected_keys"]:
            raise UnsupportedError(
                "the folder was exported by an earlier archdsl; load it by its own code "
                "(trust_remote_code=True), or bring it back by archdsl import and export it again"
            )
        return (model, info) if output_loading_info else model

    def generate(self, *args: Any, **more: Any) -> Any:
        """As transformers has it; routers choose causally, also without a cache."""
        with self.model.causal_routing():
            return super().generate(*args, **more)  # type: ignore[misc]  # self

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings

    def _prepare_cache_for_generation(
        self,
        generation_config: transformers.GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Where the cache is this model's own: that, whether a dynamic or a static one is asked
        for."""
        if self.model.standard:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]  # self
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation == "quantized":
            raise UnsupportedError("the cache of an archdsl model cannot be quantized")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            # of what is generated, the last token is not read again
            room = min(max_cache_length + 1, self.config.max_position_embeddings)
            model_kwargs["past_key_values"] = self.new_cache(max(1, room))
        return None


class ArchdslClassifier(ArchdslPreTrainedModel):
    """What the models that classify have in common.

    Their losses are means. `Trainer` averages those over the parts of an accumulated batch only
    where ``accepts_loss_kwargs`` is false; else it would add them up.
    """

    accepts_loss_kwargs = False

    @property
    def loss_function(self) -> Any:
        """The loss of the head; in training, those by which the routers learn are added."""
        return partial(self._with_routers, super().loss_function)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def _with_routers(self, of_head: Any, *args: Any, **more: Any) -> Tensor:
        loss: Tensor = of_head(*args, **more)
        return loss + sum(self.without_head.trace.losses.values()) if self.training else loss


class ArchdslForSequenceClassification(GenericForSequenceClassification, ArchdslClassifier):
    """A text to a score for each of ``config.num_labels``, read at its last token."""

    def __init__(self, config: ArchdslConfig) -> None:
        ArchdslPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ArchdslModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 0, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


class ArchdslForTokenClassification(GenericForTokenClassification, ArchdslClassifier):
    """Each token to a score for each of ``config.num_labels``."""

    def __init__(self, config: ArchdslConfig) -> None:
        ArchdslPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ArchdslModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()  # type: ignore[no-untyped-call]


class ArchdslForQuestionAnswering(GenericForQuestionAnswering, ArchdslClassifier):
    """Each token to the scores of being the first and the last one of the answer."""

    def __init__(self, config: ArchdslConfig) -> None:
        ArchdslPreTrainedModel.__init__(self, config)
        self.model = ArchdslModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.model.set_input_embeddings(value)


def _tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """How each matrix is cut for tensor parallelism, by its name with ``*`` for numbers.

    Matrices to which the passes of a loop add low-rank differences stay whole: the numbers of these
    do not say whether theirs is cut by rows or by columns.
    """
    cuts = {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
    cuts |= {"gate": "colwise", "up": "colwise", "down": "rowwise"}
    loops = [one for one in model.modules() if isinstance(one, BodyLoop) and one.lora is not None]
    whole = {inner for loop in loops for inner in loop.modules()}
    return {"embedding": "embedding_rowwise"} | {
        re.sub(r"\b\d+\b", "*", f"{name}.{part}"): cuts[part]
        for name, module in model.named_modules()
        if isinstance(module, Attention | FeedForward) and module not in whole
        for part, _ in module.named_children()
        if part in cuts
    }


def _runs(module: nn.Module, path: tuple[int, ...]) -> Iterator[tuple[Attention, tuple[int, ...]]]:
    """Each attention of each pass that keeps keys and values of its own, in their order."""
    if isinstance(module, Attention):
        yield module, path
    elif isinstance(module, BodyLoop):
        own = module.passes[:1] if module.spec.kv == "shared" else module.passes
        for one in own:
            yield from _runs(module.body(one), (*path, one.step))
    else:
        for child in module.children():
            yield from _runs(child, path)


def _saved(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Which files of weights a folder has, the whole or the index of shards, and their versions."""
    paths = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    stats = {path: path.stat() for path in paths if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_ino, stat.st_size) for path, stat in stats.items()}


def _is_loaded(module: nn.Module) -> bool:
    tensors = module.state_dict(keep_vars=True).values()
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)


def _of_chunk(past: int, mask_BS: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """The mask of the T tokens after ``past``; None where they are all real."""
    if mask_BS is None:
        return None
    T = x_BTD.size(1)
    if mask_BS.dim() != 2:
        raise UnsupportedError(f"{MASK}, got {list(mask_BS.shape)}")
    _check_mask(past, mask_BS, x_BTD)
    mask_BT = mask_BS[:, past : past + T].bool()
    return None if bool(mask_BT.all()) else mask_BT


def _check_mask(past: int | Tensor, mask: Any, x_BTD: Tensor) -> None:
    """Raises UnsupportedError if a mask lacks tokens. It may have more, as a static cache has."""
    if isinstance(past, int) and isinstance(mask, Tensor) and mask.dim() == 2:
        so_far = past + x_BTD.size(1)
        if mask.size(1) < so_far:
            raise UnsupportedError(f"{MASK}, here [.., {so_far}], got {list(mask.shape)}")


def _positions(past: int | Tensor, mask: Any, x_BTD: Tensor) -> Tensor:
    """The number of real tokens before each one in its row, [1 or B, T]."""
    place_T = torch.arange(x_BTD.size(1), device=x_BTD.device) + past
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0).index_select(1, place_T)
    return place_T.unsqueeze(0)


def _check_room(past: int | Tensor, mask: Any, x_BTD: Tensor, context: int) -> None:
    """Raises ContextFullError if a row has more real tokens than the context."""
    if isinstance(past, Tensor) or past + x_BTD.size(1) <= context:
        return
    if isinstance(mask, Tensor) and mask.dim() == 2:
        past = int(mask[:, : past + x_BTD.size(1)].sum(1).max()) - x_BTD.size(1)
    if past + x_BTD.size(1) > context:
        raise ContextFullError(f"{past + x_BTD.size(1):,} tokens exceed the context of {context:,}")


def _own_positions(
    given: Tensor | None, mask_BS: Tensor | None, x_BTD: Tensor, cache: ArchdslCache | None
) -> Tensor | None:
    """The positions, [1 or B, T], where they are not the numbers of the real tokens of a row.

    Raises UnsupportedError if they say that several texts stand in one row: the tokens of a row
    compete for the same capacity.
    """
    if given is None:
        return None
    if mask_BS is None and cache is None and bool((given.diff() != 1).any()):
        raise UnsupportedError(
            "position_ids with several texts in a row: where tokens are routed, each text needs a "
            "row of its own"
        )
    past = 0 if cache is None else cache.seen
    counts_BT = _positions(past, mask_BS, x_BTD)
    real_BT = None if mask_BS is None else mask_BS[:, past : past + x_BTD.size(1)] != 0
    other_BT = given != counts_BT if real_BT is None else (given != counts_BT) & real_BT
    return given if bool(other_BT.any()) else None


CLASSES = {
    "AutoConfig": ArchdslConfig,
    "AutoModel": ArchdslModel,
    "AutoModelForCausalLM": ArchdslForCausalLM,
    "AutoModelForSequenceClassification": ArchdslForSequenceClassification,
    "AutoModelForTokenClassification": ArchdslForTokenClassification,
    "AutoModelForQuestionAnswering": ArchdslForQuestionAnswering,
}

transformers.AutoConfig.register(ArchdslConfig.model_type, ArchdslConfig, exist_ok=True)
for name, model in CLASSES.items():
    if name != "AutoConfig":
        getattr(transformers, name).register(ArchdslConfig, model, exist_ok=True)
