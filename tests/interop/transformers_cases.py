"""The cases that transformers runs on each of its models, on exports. See test_in_transformers.py.

This file is copied beside the tests of transformers' source distribution and run there.
"""

from __future__ import annotations

import copy
import importlib
import os
import unittest
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from archdsl.interop.hf_export import plain
from archdsl.interop.hf_model import CLASSES, ArchdslConfig, ArchdslModel
from archdsl.lang.load import load

common: Any = importlib.import_module("tests.test_modeling_common")

LAYER = "{kind: layer, attention: {head_size: 16}, ffn: {hidden: 32}}"
BLOCKS = {
    "looped": f"[{{kind: loop, steps: 2, residual: overwrite, body: {LAYER}}}]",
    "itt": f"[{{kind: loop, steps: 2, router: {{kind: prefix, capacity: 0.6}}, body: {LAYER}}}]",
}
# which heads a case belongs to, it reads there
modeling_auto.MODEL_MAPPING_NAMES["archdsl"] = "ArchdslModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["archdsl"] = "ArchdslForCausalLM"


class Tester:
    """What the cases ask for: sizes, configs and inputs."""

    batch_size, seq_length, hidden_size, num_attention_heads = 13, 7, 32, 2
    is_training, use_input_mask = True, True

    def __init__(self, blocks: str, layers: int) -> None:
        self.blocks, self.num_hidden_layers = blocks, layers

    def get_config(self) -> ArchdslConfig:
        sizes = ["vocab_size=99", "dim=32", "context=512", f"blocks={self.blocks}"]
        spec = plain(load("tiny", overrides=[*sizes, "tie_embeddings=false"]))
        config = ArchdslConfig(spec, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        built = copy.deepcopy(config)
        with torch.device("meta"):
            ArchdslModel(built)
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if hasattr(built, name):
                setattr(config, name, getattr(built, name))
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[ArchdslConfig, dict[str, Any]]:
        shape = (self.batch_size, self.seq_length)
        tokens = common.ids_tensor(list(shape), 99)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@unittest.skipUnless(os.environ.get("ARCHDSL_CASES"), "run by test_in_transformers.py")
class Looped(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """A model without routers: all that Llama passes."""

    all_model_classes = (CLASSES["AutoModel"], CLASSES["AutoModelForCausalLM"])
    all_generative_model_classes = (CLASSES["AutoModelForCausalLM"],)
    pipeline_model_mapping: dict[str, Any] = {}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = Tester(BLOCKS["looped"], 2)


class Itt(Looped):
    """A model with a router, whose attention weights are not returned."""

    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Tester(BLOCKS["itt"], 1)
