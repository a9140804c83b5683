"""The language model as one of transformers' own: config, model, cache.

Importing this module makes the Auto classes know it, so that an exported folder loads without code
of its own. The folder carries this very source (see `archdsl.interop.source_bundle`)
for those without archdsl.

Shapes: B batch, T tokens of a chunk, S tokens so far with the chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Primitive, stream_depth
from archdsl.nn.cache import Cache

logger = logging.get_logger(__name__)


class UnsupportedError(ArchdslError, ValueError):
    """Something that transformers offers and these models cannot do."""


class ArchdslConfig(transformers.PreTrainedConfig):
    """``spec``: the whole spec as plain data; the sizes that tools look for are taken from it.

    ``use_cache``: what a forward pass that does not say so does. Off: a cache has room for the
    whole context. `generate` uses one anyway. ``see_later_tokens``: whether routers that see later
    tokens in training do so outside of it, too. Off, because the logits then are no predictions:
    scores of likelihood would be better than any text that the model can generate.
    """

    model_type: ClassVar[str] = "archdsl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        use_cache: bool = False,
        see_later_tokens: bool = False,
        **more: Any,
    ) -> None:
        self.spec, self.use_cache, self.see_later_tokens = spec, use_cache, see_later_tokens
        if spec is not None:
            more |= {"tie_word_embeddings": spec["tie_embeddings"]}
            self.vocab_size, self.hidden_size = spec["vocab_size"], spec["dim"]
            self.max_position_embeddings = spec["context"]
        super().__init__(**more)


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


class ArchdslForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Tokens to the logits of their successors.

    A router that sees later tokens does so in training alone, unless the config says
    ``see_later_tokens``; never with a cache or in `generate`.
    """

    config_class = ArchdslConfig
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {  # type: ignore[misc]  # one of the instance
        "model.head.weight": "model.embedding.weight"
    }

    def __init__(self, config: ArchdslConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(ModelSpec.model_validate(config.spec))
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ArchdslCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with ``labels`` [B, T] also the loss, shifted here, -100 left out.

        ``attention_mask`` [B, S]: 0 is padding, on whatever side. Raises ContextFullError past the
        context.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        states = [x_BTD] if self._wanted("output_hidden_states", more) else None
        normed_BTD = self._normed(x_BTD, attention_mask, cache, states, more)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.model.head(normed_BTD[:, kept])
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits_BTV, labels, more),
            logits=logits_BTV,
            past_key_values=cache,
            hidden_states=None if states is None else (*states[:-1], normed_BTD),
        )

    def _normed(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None,
        cache: ArchdslCache | None,
        states: list[Tensor] | None,
        more: dict[str, Any],
    ) -> Tensor:
        mask_BT = _of_chunk(mask_BS, x_BTD)
        _refuse_other_positions(more.pop("position_ids", None), mask_BS, x_BTD, cache)
        self.model.checkpoint_activations = self.gradient_checkpointing
        kept = None if cache is None else cache.kept
        if cache is not None:
            cache.make_room(x_BTD.size(1), self.config.max_position_embeddings)
        sees = self.training or self.config.see_later_tokens
        with nullcontext() if sees else self.model.causal_routing():
            hidden_BTD = self.model.hidden(x_BTD, mask_BT, kept, states)
        if cache is not None:
            cache.seen += x_BTD.size(1)
        return self.model.norm(hidden_BTD)

    def _cache(self, given: ArchdslCache | None, use_cache: bool | None) -> ArchdslCache | None:
        if given is not None and not isinstance(given, ArchdslCache):
            raise UnsupportedError(
                f"an archdsl model keeps more than keys and values: give it what its new_cache() "
                f"returns, not a {type(given).__name__}"
            )
        wanted = self.config.use_cache if use_cache is None else use_cache
        if not wanted and given is None:
            return None
        if self.gradient_checkpointing and self.training:
            logger.warning_once("gradient checkpointing computes twice: nothing is kept")
            return None
        return self.new_cache() if given is None else given

    def _wanted(self, name: str, more: dict[str, Any]) -> bool:
        wanted = more.pop(name, None)
        return bool(getattr(self.config, name, False) if wanted is None else wanted)

    def _loss(self, logits_BTV: Tensor, labels_BT: Tensor, more: dict[str, Any]) -> Tensor:
        loss = self.loss_function(logits_BTV, labels_BT, self.config.vocab_size, **more)
        if self.training:  # routers learn by losses of their own
            whole = more.get("num_items_in_batch")  # targets of a batch that this is a part of
            part = 1 if whole is None else (labels_BT[..., 1:] != -100).sum() / whole
            loss = loss + part * sum(self.model.trace.losses.values())
        return loss

    def new_cache(self, max_length: int | None = None) -> ArchdslCache:
        """An empty one, with room for so many tokens of each row; default: the context."""
        return ArchdslCache(self.model.new_cache(max_length))

    def dial(
        self, capacity: Sequence[float] | float | None = None, steps: int | None = None
    ) -> None:
        """See `LanguageModel.dial`."""
        self.model.dial(capacity, steps)

    def generate(self, *args: Any, **more: Any) -> Any:
        """As transformers has it; routers choose causally, also without a cache."""
        with self.model.causal_routing():
            return super().generate(*args, **more)  # type: ignore[misc]  # self

    def save_pretrained(self, *args: Any, **more: Any) -> None:
        """As transformers has it, with all that the routers learned."""
        self.model.commit()
        super().save_pretrained(*args, **more)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **more: Any) -> nn.Embedding:
        """As transformers has it; the spec follows, so that what is saved can be loaded again."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **more)
        self.config.spec = dict(self.config.spec or {}) | {"vocab_size": embedding.num_embeddings}
        self.model.spec = ModelSpec.model_validate(self.config.spec)
        weights: list[Any] = [embedding.weight, self.model.head.weight]
        for weight in weights:
            weight._is_hf_initialized = True  # so that `post_init` draws nothing anew
        return embedding

    @torch.no_grad()
    @guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Draws what was not loaded, as archdsl does; by torch's own seed."""
        depth = stream_depth(self.model)
        rng = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())))
        for module in self.modules():
            if isinstance(module, Primitive) and not _is_loaded(module):
                module.reset(rng, depth)

    def _prepare_cache_for_generation(
        self,
        generation_config: transformers.GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A cache of this model, whether a dynamic or a static one is asked for."""
        kind = generation_config.cache_implementation
        if kind == "quantized":
            raise UnsupportedError("the cache of an archdsl model cannot be quantized")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            # of what is generated, the last token is not read again
            room = min(max_cache_length + 1, self.config.max_position_embeddings)
            model_kwargs["past_key_values"] = self.new_cache(max(1, room))


def _is_loaded(module: nn.Module) -> bool:
    tensors = module.state_dict(keep_vars=True).values()
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)


def _of_chunk(mask_BS: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """The mask of the last T tokens; None where they are all real."""
    if mask_BS is None:
        return None
    if mask_BS.dim() != 2 or mask_BS.size(1) < x_BTD.size(1):
        raise UnsupportedError(
            f"attention_mask must be [batch, tokens so far], got {list(mask_BS.shape)}"
        )
    mask_BT = mask_BS[:, -x_BTD.size(1) :].bool()
    return None if bool(mask_BT.all()) else mask_BT


def _refuse_other_positions(
    given: Tensor | None, mask_BS: Tensor | None, x_BTD: Tensor, cache: ArchdslCache | None
) -> None:
    """Positions count the real tokens of a row; those of several texts in one row would not."""
    if given is None:
        return
    B, T, _ = x_BTD.shape
    if mask_BS is None:
        mask_BS = given.new_ones(B, T + (0 if cache is None else cache.seen))
    count_BT = (mask_BS.long().cumsum(1) - 1)[:, -T:]
    if bool(((given != count_BT) & (mask_BS[:, -T:] != 0)).any()):
        raise UnsupportedError(
            "an archdsl model counts positions by attention_mask; leave position_ids out"
        )


transformers.AutoConfig.register(ArchdslConfig.model_type, ArchdslConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(ArchdslConfig, ArchdslForCausalLM, exist_ok=True)
